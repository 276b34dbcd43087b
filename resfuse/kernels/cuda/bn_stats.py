"""bn_stats: mean and biased variance of each channel (`csrc/cuda/bn_stats.cu`)."""

from torch import Tensor

from ..interface import Stats
from ._operands import check_rows
from ._ops import ops


def bn_stats(z: Tensor) -> Stats:
    check_rows(z=z)
    return Stats(*ops().bn_stats(z))
