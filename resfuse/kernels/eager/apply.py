"""apply: out = act(scale * z + shift + residual) and its mask. Reads z and the residual once, writes out."""

from torch import Tensor

from ..interface import Norm, Residual
from ._rows import rows
from ._sum import write_sum


def apply(a: Norm, residual: Residual, relu: bool, want_mask: bool) -> tuple[Tensor, Tensor | None]:
    z = rows(a.z)

    def main(part: slice) -> Tensor:
        return (z[part] * a.scale).add_(a.shift)

    return write_sum(main, a.z, z.shape[1], residual, relu, want_mask)
