"""bn_dgrad: scale * (dy - mean_dy - (z - mean) * slope) as a tensor (`csrc/cpu/bn_dgrad.cpp`)."""

from torch import Tensor

from ... import _native
from ..interface import BNGrad
from ._operands import gradient


def bn_dgrad(grad: BNGrad) -> Tensor:
    return _native.load().bn_dgrad(*gradient(grad))
