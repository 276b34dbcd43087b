"""expand_products: P, sum(g) and u = g @ Wg in one pass over g (`csrc/cpu/expand_products.cpp`)."""

from torch import Tensor

from ... import _native
from ..interface import Act, Grad
from . import _operands


def expand_products(
    g: Grad, a: Act, mean: Tensor | None, wg: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    products, total, u = _native.load().expand_products(*_operands.masked(g), *_operands.act(a), mean, wg)
    return products, total, None if wg is None else u
