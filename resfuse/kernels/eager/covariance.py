"""covariance: mean and biased covariance of the rows. Reads a twice: the mean first, then the centred products.

Centring before the products keeps float32's digits where channel means are many standard deviations.
"""

import torch
from torch import Tensor

from ..interface import Act
from ._rows import as_read, chunks, rows
from .prepare import prepare


def covariance(a: Act) -> tuple[Tensor, Tensor]:
    y = rows(prepare(a))
    count, channels = y.shape
    total = sum(as_read(y[part]).sum(0, dtype=torch.float64) for part in chunks(count, channels, y.device))
    exact = as_read(y[:0]).dtype
    mean = (total / count).to(exact)
    cov = torch.zeros(channels, channels, dtype=exact, device=y.device)
    for part in chunks(count, channels, y.device):
        centred = as_read(y[part]) - mean
        cov.addmm_(centred.t(), centred)
    return mean, cov.div_(count)
