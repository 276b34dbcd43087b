"""expand_dgrad: g @ Wg - q_scale * (a @ q) - c, masked by a's ReLU where asked (`csrc/cuda/expand_dgrad.cu`)."""

from torch import Tensor

from .. import flat
from ..interface import Act, Grad
from ..rounding import rounds_to_tf32
from ._operands import check_rows, check_views, vector
from ._ops import ops


def expand_dgrad(
    g: Grad, u: Tensor | None, a: Act, wg: Tensor,
    q: Tensor | None, q_scale: Tensor | None, c: Tensor | None, relu: bool, mean: Tensor | None,
) -> Tensor:
    operands, (x, scale, shift, x_relu) = flat.masked(g), flat.act(a)
    check_rows(g=operands[0], u=u)
    check_views(a=x)
    activation = x, vector(scale), vector(shift), x_relu
    return ops().expand_dgrad(*operands, u, *activation, wg, q, q_scale, vector(c), relu, rounds_to_tf32(x))
