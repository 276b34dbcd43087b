"""bn_reduce: dbeta = sum(dy), dgamma = invstd * sum(dy * (z - mean)). Reads dy and z once."""

import torch
from torch import Tensor

from ..interface import Masked
from ._rows import dense
from .select import select


def bn_reduce(dy: Tensor | Masked, z: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    dy = select(dy) if isinstance(dy, Masked) else dy
    _, dgamma, dbeta = native_backward(dy, z, None, mean, invstd, (False, True, True))
    return dbeta, dgamma


def native_backward(
    dy: Tensor, z: Tensor, gamma: Tensor | None, mean: Tensor, invstd: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, dgamma, dbeta) of BatchNorm with batch statistics, by torch's kernel."""
    dy, z = dense(dy), dense(z)
    gamma = torch.ones_like(mean) if gamma is None else gamma.to(mean.dtype)
    return torch.ops.aten.native_batch_norm_backward(dy, z, gamma, None, None, mean, invstd, True, 0.0, needs)
