"""scale_weight: Wg = scale[:, None] * weight, rounded once to storage."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch


@triton.jit
def _scale_weight(weight, scale, wg, C, E, BLOCK: tl.constexpr):
    # weight, wg [K, C] storage, E values; scale [K] float32
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t = tl.load(weight + at, mask=at < E).to(tl.float32) * tl.load(scale + at // C, mask=at < E)
    tl.store(wg + at, t.to(wg.dtype.element_ty), mask=at < E)


def scale_weight(weight: Tensor, scale: Tensor) -> Tensor:
    wg, block = torch.empty_like(weight), 1024
    launch(
        _scale_weight, -(-wg.numel() // block), wg, weight, scale, wg, weight.shape[1], wg.numel(), BLOCK=block,
        num_warps=4,
    )
    return wg
