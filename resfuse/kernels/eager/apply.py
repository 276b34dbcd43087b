"""apply: a sum whose main branch is scale * z + shift, and its mask. Reads z and the residual once, writes out."""

import torch
from torch import Tensor

from ..interface import Norm, Sum, Want, Written
from ._rows import dense
from ._sum import write_sum


def apply(a: Norm, total: Sum, want: Want) -> Written:
    def main(z: Tensor, into: Tensor) -> Tensor:
        product = torch.mul(z, a.scale, out=into) if into.dtype == a.scale.dtype else z * a.scale
        return product.add_(a.shift)

    return write_sum(dense(a.z), main, a.z.shape[1], total, want)
