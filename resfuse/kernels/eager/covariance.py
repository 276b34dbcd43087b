"""covariance: mean and biased covariance of the rows. Reads a twice: the mean first, then the centred products.

Centring before the products keeps float32's digits where channel means are many standard deviations; merging short
parts in float64 keeps them where there are many rows.
"""

import torch
from torch import Tensor

from ..interface import Act
from ._rows import as_read, dense, parts
from .prepare import prepare

_ROWS_OF_A_WIDE_SUM = 1024


def covariance(a: Act) -> tuple[Tensor, Tensor]:
    y = dense(prepare(a))
    n, channels, h, w = y.shape
    count = n * h * w
    total = sum(as_read(part).sum(0, dtype=torch.float64) for (part,) in parts(y, most=_ROWS_OF_A_WIDE_SUM))
    mean = total / count
    cov = torch.zeros(channels, channels, dtype=torch.float64, device=y.device)
    for (part,) in parts(y, most=_ROWS_OF_A_WIDE_SUM):
        values = as_read(part)
        centred = values - mean.to(values.dtype)
        cov += centred.t() @ centred
    return mean.to(values.dtype), cov.div_(count).to(values.dtype)
