"""expand_dgrad: g @ Wg - q_scale * (a @ q) - c, masked by a's ReLU where asked (`csrc/cpu/expand_dgrad.cpp`)."""

from torch import Tensor

from ... import _native
from ..interface import Act, Grad
from . import _operands


def expand_dgrad(
    g: Grad, u: Tensor | None, a: Act, wg: Tensor,
    q: Tensor | None, q_scale: Tensor | None, c: Tensor | None, relu: bool, mean: Tensor | None,
) -> Tensor:
    _operands.check_rows(u=u)
    operands = *_operands.masked(g), u, *_operands.act(a), wg
    return _native.load().expand_dgrad(*operands, q, q_scale, c, relu)
