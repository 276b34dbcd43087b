"""expand_stats: mean3 = W @ mean, var3 = rowsum((W @ cov) * W), clamped at 0 (NaN kept)."""

from torch import Tensor

from ..interface import Stats, wide
from ._rows import as_read


def expand_stats(weight: Tensor, mean: Tensor, cov: Tensor) -> Stats:
    w = as_read(weight).to(cov.dtype)
    var = (w @ cov).mul_(w).sum(1).clamp_min_(0)
    return Stats((w @ mean).to(wide(weight.dtype)), var.to(wide(weight.dtype)))
