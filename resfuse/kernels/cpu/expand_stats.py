"""expand_stats: W @ mean and rowsum((W @ cov) * W), clamped at 0 (`csrc/cpu/expand_stats.cpp`)."""

from torch import Tensor

from ... import _native
from ..interface import Stats
from ._operands import check_stored, check_vectors


def expand_stats(weight: Tensor, mean: Tensor, cov: Tensor) -> Stats:
    check_stored(weight=weight)
    check_vectors(mean=mean, cov=cov)
    return Stats(*_native.load().expand_stats(weight, mean, cov))
