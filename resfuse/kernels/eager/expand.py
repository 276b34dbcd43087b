"""expand: a sum whose main branch is scale * (a @ W.T) + shift; the 1x1's raw output is never stored."""

from torch import Tensor

from ..interface import Act, Sum, Want, Written
from ._rows import dense, product
from ._sum import write_sum
from .prepare import prepare


def expand(a: Act, weight: Tensor, scale: Tensor, shift: Tensor, total: Sum, want: Want) -> Written:
    def main(y: Tensor, into: Tensor) -> Tensor:
        return product(y, weight.t(), into).mul_(scale).add_(shift)

    return write_sum(dense(prepare(a)), main, weight.shape[0], total, want)
