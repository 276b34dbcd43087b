"""covariance: mean and biased covariance of the rows. Reads a twice: the mean first, then the centred products.

Centring before the products keeps float32's digits where channel means are many standard deviations; merging short
chunks in float64 keeps them where there are many rows.
"""

import torch
from torch import Tensor

from ..interface import Act
from ._rows import as_read, chunks, rows
from .prepare import prepare

_ROWS_OF_A_WIDE_SUM = 1024


def covariance(a: Act) -> tuple[Tensor, Tensor]:
    y = rows(prepare(a))
    count, channels = y.shape
    parts = [part for part in chunks(count, channels, y.device, most=_ROWS_OF_A_WIDE_SUM)]
    total = sum(as_read(y[part]).sum(0, dtype=torch.float64) for part in parts)
    exact = as_read(y[:0]).dtype
    mean = (total / count).to(exact)
    cov = torch.zeros(channels, channels, dtype=torch.float64, device=y.device)
    for part in parts:
        centred = as_read(y[part]) - mean
        cov += centred.t() @ centred
    return mean, cov.div_(count).to(exact)
