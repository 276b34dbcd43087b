"""expand: out = relu(scale * (a @ W.T) + shift + residual) and its mask; the 1x1's raw output is never stored."""

from torch import Tensor

from ..interface import Act, Residual
from ._rows import dense, product
from ._sum import write_sum
from .prepare import prepare


def expand(
    a: Act, weight: Tensor, scale: Tensor, shift: Tensor, residual: Residual, want_mask: bool
) -> tuple[Tensor, Tensor | None]:
    def main(y: Tensor, into: Tensor) -> Tensor:
        return product(y, weight.t(), into).mul_(scale).add_(shift)

    return write_sum(dense(prepare(a)), main, weight.shape[0], residual, True, want_mask)
