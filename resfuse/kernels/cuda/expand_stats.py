"""expand_stats: W @ mean and rowsum((W @ cov) * W), clamped at 0 (`csrc/cuda/expand_stats.cu`)."""

from torch import Tensor

from ..interface import Stats
from ..nvidia import check_stored
from . import _ops
from ._operands import as_read, vector


def expand_stats(weight: Tensor, mean: Tensor, cov: Tensor) -> Stats:
    check_stored(_ops.instead, weight=weight)
    return Stats(*_ops.ops().expand_stats(as_read(weight), vector(mean), vector(cov)))
