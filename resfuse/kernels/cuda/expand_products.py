"""expand_products: P = g.T @ (a - mean) and sum(g) (`csrc/cuda/expand_products.cu`); u is left to `expand_dgrad`."""

from torch import Tensor

from .. import flat
from ..interface import Act, Grad
from ..nvidia import rounds_to_tf32
from ._operands import check_rows, check_views, vector
from ._ops import ops


def expand_products(
    g: Grad, a: Act, mean: Tensor | None, wg: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    operands, (x, scale, shift, relu) = flat.masked(g), flat.act(a)
    check_rows(g=operands[0])
    check_views(a=x)
    activation = x, vector(scale), vector(shift), relu
    products, total, _ = ops().expand_products(*operands, *activation, vector(mean), None, rounds_to_tf32(x))
    return products, total, None
