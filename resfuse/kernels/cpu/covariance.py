"""covariance: mean and biased covariance of the rows (`csrc/cpu/covariance.cpp`)."""

from torch import Tensor

from ... import _native
from ..interface import Act
from ._operands import act


def covariance(a: Act) -> tuple[Tensor, Tensor]:
    return _native.load().covariance(*act(a))
