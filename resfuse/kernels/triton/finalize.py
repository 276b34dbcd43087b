"""finalize: invstd = (var + eps)^-1/2, scale = gamma * invstd, shift = beta - mean * scale. C-length work."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import Affine, Stats
from ._launch import launch
from ._operands import vector


@triton.jit
def _finalize(mean, var, gamma, beta, affine, eps, C, BLOCK: tl.constexpr):
    # mean, var [C] float32; gamma, beta [C] or None; affine [3, C] float32: scale, shift, invstd
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < C
    invstd = 1 / tl.sqrt_rn(tl.load(var + cols, mask=inside, other=1.0) + eps)
    scale = invstd
    if gamma is not None:
        scale = tl.load(gamma + cols, mask=inside).to(tl.float32) * invstd
    shift = -tl.load(mean + cols, mask=inside) * scale
    if beta is not None:
        shift += tl.load(beta + cols, mask=inside).to(tl.float32)
    tl.store(affine + cols, scale, mask=inside)
    tl.store(affine + C + cols, shift, mask=inside)
    tl.store(affine + 2 * C + cols, invstd, mask=inside)


def finalize(stats: Stats, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Affine:
    channels, block = stats.mean.shape[0], 256
    affine = torch.empty((3, channels), dtype=torch.float32, device=stats.mean.device)
    launch(
        _finalize, -(-channels // block), affine, *map(vector, (*stats, gamma, beta)), affine, eps, channels,
        BLOCK=block, num_warps=4,
    )
    return Affine(*affine)
