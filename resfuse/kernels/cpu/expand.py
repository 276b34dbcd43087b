"""expand: a sum whose main branch is scale * (a @ W.T) + shift, the product never stored (`csrc/cpu/expand.cpp`)."""

from torch import Tensor

from ... import _native
from .. import flat
from ..interface import Act, Sum, Want, Written
from . import _operands


def expand(a: Act, weight: Tensor, scale: Tensor, shift: Tensor, total: Sum, want: Want) -> Written:
    operands = *_operands.act(a), weight, scale, shift, *_operands.second(total.residual)
    return flat.written(_native.load().expand(*operands, *_operands.total(total, want)), want)
