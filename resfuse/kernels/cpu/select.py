"""select: scale * row_scale[n] * (dout where mask else 0) as a tensor (`csrc/cpu/bn_dgrad.cpp`)."""

from torch import Tensor

from ... import _native
from ..interface import Masked
from ._operands import gradient


def select(grad: Masked) -> Tensor:
    return _native.load().bn_dgrad(*gradient(grad))
