"""SyncBatchNorm: batch statistics over all processes of a group, whose batches may have different sizes.

    N = sum_r n_r    mean = sum_r n_r mean_r / N    var = sum_r n_r (var_r + (mean_r - mean)^2) / N
    dz = scale * (dy - sum(dy) / N - (z - mean) * invstd^2 * sum(dy * (z - mean)) / N)      both sums over all processes

The collectives are those of torch.nn.SyncBatchNorm, with the same contents in the same order: mean, 1 / sqrt(var + eps)
and n gathered in forward, sum(dy) and sum(dy * (z - mean)) added in backward. A process that runs the original forward,
for an empty batch say, meets the others so. dgamma and dbeta stay each process's own, as there: whoever averages
gradients averages them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.interface import BNGrad, Grad, Stats


class Shared(NamedTuple):
    """stats: of all processes; running: the same with the unbiased variance; count: N, a wide scalar tensor."""

    stats: Stats
    running: Stats
    count: Tensor


def check_first_order(spec) -> None:
    """Raises where gradients of gradients would need those of a collective; torch.nn.SyncBatchNorm has none either."""
    if spec.group is not None:
        raise RuntimeError("gradients of gradients through SyncBatchNorm are not supported, by torch neither")


def gather(own: Stats, count: int, eps: float, group: dist.ProcessGroup) -> Shared:
    """The group's statistics from this process's, of `count` values a channel."""
    mean, var = own
    sent = torch.cat([mean, (var + eps).rsqrt(), mean.new_full((1,), count)])
    received = sent.new_empty(dist.get_world_size(group), len(sent))
    if dist.get_backend(group) == dist.Backend.GLOO:  # which gathers into tensors in no older torch, and on no GPU
        dist.all_gather(list(received.unbind()), sent, group)
    else:
        dist.all_gather_into_tensor(received.view(-1), sent, group)
    means, invstds, counts = received.split([len(mean), len(mean), 1], 1)
    there = counts > 0  # a process without values sends zeros, of which there is no variance
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    variances = torch.where(there, invstds, 1).pow(-2) - eps
    var = (counts * (variances + (means - mean) ** 2)).sum(0).div(total).clamp(min=0)
    return Shared(Stats(mean, var), Stats(mean, var * (total / (total - 1))), total)


def gradient_sums(
    dgamma: Tensor, dbeta: Tensor, invstd: Tensor, count: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """`BNGrad`'s mean_dy and slope, from this process's dgamma and dbeta."""
    sums = torch.cat([dbeta, dgamma / invstd])
    dist.all_reduce(sums, group=group)
    mean_dy, covariance = (sums / count).chunk(2)
    return mean_dy, invstd**2 * covariance


def completed(
    kernels, dz: Grad, z: Tensor, mean: Tensor, scale: Tensor, mean_dy: Tensor, slope: Tensor
) -> BNGrad | Tensor:
    """BatchNorm's gradient from dz, what it would be with constant statistics."""
    if isinstance(dz, BNGrad):
        return dz._replace(mean_dy=mean_dy, slope=slope)
    return kernels.bn_dgrad(BNGrad(dz, z, mean, torch.ones_like(scale), scale * mean_dy, scale * slope))
