"""finalize: scale = gamma * invstd, shift = beta - mean * scale. C-length work."""

import torch
from torch import Tensor

from ..interface import Affine, Stats


def finalize(stats: Stats, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Affine:
    invstd = (stats.var + eps).rsqrt()
    scale = invstd if gamma is None else gamma.to(invstd.dtype) * invstd
    shift = -stats.mean * scale if beta is None else torch.addcmul(beta.to(scale.dtype), stats.mean, scale, value=-1)
    return Affine(scale, shift, invstd)
