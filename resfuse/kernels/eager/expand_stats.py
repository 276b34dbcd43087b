"""expand_stats: mean3 = W @ mean, var3 = rowsum((W @ cov) * W), clamped at 0 (NaN kept)."""

from torch import Tensor

from ..interface import Stats
from ._rows import as_read


def expand_stats(weight: Tensor, mean: Tensor, cov: Tensor) -> Stats:
    w = as_read(weight)
    var = (w @ cov.to(w.dtype)).mul_(w).sum(1).clamp_min_(0)
    return Stats((w @ mean.to(w.dtype)).to(mean.dtype), var.to(cov.dtype))
