"""expand: out = relu(scale * (a @ W.T) + shift + residual) and its mask; the 1x1's raw output is never stored."""

from torch import Tensor

from ..interface import Act, Residual
from ._rows import product, rows
from ._sum import write_sum
from .prepare import prepare


def expand(
    a: Act, weight: Tensor, scale: Tensor, shift: Tensor, residual: Residual, want_mask: bool
) -> tuple[Tensor, Tensor | None]:
    a = prepare(a)
    y, w = rows(a), weight.t()

    def main(part: slice) -> Tensor:
        return product(y[part], w).mul_(scale).add_(shift)

    return write_sum(main, a, weight.shape[0], residual, True, want_mask)
