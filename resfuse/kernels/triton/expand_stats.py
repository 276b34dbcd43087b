"""expand_stats: mean3 = W @ mean, var3 = rowsum((W @ cov) * W), clamped at 0 (NaN kept); float32 whatever the switches.

Reads W twice, cov once for each row of tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import Stats
from . import _operands
from ._launch import launch
from ._tiles import as_read, load_weight, rectify


@triton.jit
def times_covariance(weight, cov, rows, cols, K, C, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
                     BLOCK_C: tl.constexpr):
    """(W @ cov)[rows, cols], float32."""
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i in range(0, C, BLOCK_C):
        depth = i + tl.arange(0, BLOCK_C)
        w = as_read(load_weight(weight, rows, depth, K, C, False, False), PRECISION).to(tl.float32)
        acc = tl.dot(w, load_weight(cov, depth, cols, C, C, False, False), acc, input_precision="ieee")
    return acc


@triton.jit
def _expand_stats(
    weight,  # [K, C] storage
    mean, cov,  # [C], [C, C] float32
    stats,  # [2, K] float32
    K, C,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    centre = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    var = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for j in range(0, C, BLOCK_C):
        cols = j + tl.arange(0, BLOCK_C)
        w = as_read(load_weight(weight, rows, cols, K, C, False, False), PRECISION).to(tl.float32)
        centre += w * tl.load(mean + cols, mask=cols < C, other=0.0)[None, :]
        var += w * times_covariance(weight, cov, rows, cols, K, C, PRECISION, BLOCK_R, BLOCK_C)
    tl.store(stats + rows, tl.sum(centre, 1), mask=rows < K)
    tl.store(stats + K + rows, rectify(tl.sum(var, 1)), mask=rows < K)


def expand_stats(weight: Tensor, mean: Tensor, cov: Tensor) -> Stats:
    outer, inner = weight.shape
    stats = torch.empty((2, outer), dtype=torch.float32, device=weight.device)
    block = 16
    launch(
        _expand_stats, -(-outer // block), weight, weight, mean, cov, stats, outer, inner,
        PRECISION=_operands.precision(weight), BLOCK_R=block, BLOCK_C=32 if inner <= 32 else 64, num_warps=4,
    )
    return Stats(*stats)
