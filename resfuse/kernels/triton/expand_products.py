"""expand_products: P = g.T @ (a - mean) and sum(g), read from recipes. Reads g and a.

u = g @ Wg is left to `expand_dgrad`.
"""

from torch import Tensor

from ..interface import Act, Grad
from ._outer_product import outer_product


def expand_products(
    g: Grad, a: Act, mean: Tensor | None, wg: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    products, total = outer_product(g, a, mean, sums=True)
    return products, total, None
