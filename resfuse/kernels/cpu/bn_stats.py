"""bn_stats: mean and biased variance of each channel (`csrc/cpu/bn_stats.cpp`)."""

from torch import Tensor

from ... import _native
from ..interface import Stats
from ._operands import check_rows


def bn_stats(z: Tensor) -> Stats:
    check_rows(z=z)
    return Stats(*_native.load().bn_stats(z))
