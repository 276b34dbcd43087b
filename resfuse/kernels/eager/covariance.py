"""covariance: mean and biased covariance of the rows. Reads a twice: the mean first, then the centred products.

All in float64: a float32 sum over a few hundred rows already costs a variance more than 4 eps32 kappa.
"""

import torch
from torch import Tensor

from ..interface import Act, wide
from ._rows import as_read, dense, parts
from .prepare import prepare


def covariance(a: Act) -> tuple[Tensor, Tensor]:
    y = dense(prepare(a))
    n, channels, h, w = y.shape
    count, exact = n * h * w, wide(y.dtype)
    mean = sum(as_read(part).sum(0, dtype=torch.float64) for (part,) in parts(y)) / count
    cov = torch.zeros(channels, channels, dtype=torch.float64, device=y.device)
    for (part,) in parts(y):
        centred = as_read(part) - mean
        cov.addmm_(centred.t(), centred)
    return mean.to(exact), cov.div_(count).to(exact)
