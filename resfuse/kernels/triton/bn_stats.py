"""bn_stats: mean and biased variance of each channel. Reads z once, and the first rows of each share twice.

    of each share: p = mean of its first rows,  S = sum(z - p),  G = sum((z - p)^2)
                   mean_s = p + S / n,  M2_s = G - S^2 / n

Sums are each thread's own until the last row has been read: rows are added across threads once a share.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import Stats
from . import _operands, _table
from ._launch import arch, launch
from ._moments import merge_moments, store_moments
from ._tiles import load_tile


@triton.jit(do_not_specialize=["M", "blocks", "each"])
def _bn_stats(
    z,  # [M, C] storage
    partial,  # [shares, 2, C] float32
    M, C, blocks, each,
    EVEN_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(C, BLOCK_C)
    share, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    cols = column * BLOCK_C + tl.arange(0, BLOCK_C)
    begin, end = share * each, tl.minimum(share * each + each, blocks)
    index = begin * BLOCK_M + tl.arange(0, BLOCK_M)
    first = load_tile(z, index.to(tl.int64) * C, cols, index < M, C, EVEN_C).to(tl.float32)
    pivot = tl.sum(first, 0)[None, :] / tl.minimum(M - begin * BLOCK_M, BLOCK_M).to(tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for block in range(begin, end):
        index = block * BLOCK_M + tl.arange(0, BLOCK_M)
        t = load_tile(z, index.to(tl.int64) * C, cols, index < M, C, EVEN_C)
        apart = tl.where((index < M)[:, None], t.to(tl.float32) - pivot, 0.0)
        total += apart
        squares += apart * apart
    count = (tl.minimum(M, end * BLOCK_M) - begin * BLOCK_M).to(tl.float32)
    along = tl.sum(total, 0)
    mean, squares = tl.sum(pivot, 0) + along / count, tl.sum(squares, 0) - along * (along / count)
    store_moments(partial, share, cols, C, C, mean, squares)


def bn_stats(z: Tensor) -> Stats:
    _operands.check_rows(z=z)
    count, channels = _operands.rows(z), z.shape[1]
    tile = _table.tile("bn_stats", z.dtype, channels, arch(z))
    columns = -(-channels // tile.channels)
    shares, each = _table.shares(count, tile.rows, columns, tile.shares)
    partial = torch.empty((shares, 2, channels), dtype=torch.float32, device=z.device)
    launch(
        _bn_stats, shares * columns, z, z, partial, count, channels, -(-count // tile.rows), each,
        EVEN_C=channels % tile.channels == 0, BLOCK_M=tile.rows, BLOCK_C=tile.channels, **tile.options,
    )
    return merge_moments(partial, each * tile.rows, count)
