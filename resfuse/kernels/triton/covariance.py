"""covariance: mean and biased covariance of the rows of an activation.

    of each share: p = mean of its first rows (float32; 0 in 16 bits),  S = sum(a - p),  G = (a - p).T @ (a - p)
                   mean_s = p + S / n,  M2_s = G - S S.T / n
    of all:        mean = sum(n_s mean_s) / M,  cov = (sum(M2_s) + sum(n_s (mean_s - mean)(mean_s - mean).T)) / M

Reads a once for each pair of column tiles, of which only the upper ones are computed. The pivot p keeps the digits that
an uncentred G would lose in float32; 16-bit values have none to lose beside their own rounding, and would have to be
rounded again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import Act
from . import _operands, _table
from ._launch import arch, launch
from ._moments import BLOCK_S, merging_tile
from ._tiles import as_read, load_act, row_starts


@triton.jit(do_not_specialize=["M", "blocks", "each"])
def _covariance(
    a,  # ActArgs [M, C]
    means,  # [shares, C] float32
    squares,  # [shares, C, C] float32, tiles on and above the diagonal
    M, C, blocks, each,
    RELU: tl.constexpr, EVEN_C: tl.constexpr, PIVOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(C, BLOCK_C)
    share, pair = tl.program_id(0) // (columns * columns), tl.program_id(0) % (columns * columns)
    up, across = pair // columns, pair % columns
    if up <= across:
        left = up * BLOCK_C + tl.arange(0, BLOCK_C)
        right = across * BLOCK_C + tl.arange(0, BLOCK_C)
        left_pivot = tl.zeros((1, BLOCK_C), tl.float32)
        right_pivot = tl.zeros((1, BLOCK_C), tl.float32)
        begin, end = share * each, tl.minimum(share * each + each, blocks)
        if PIVOT:
            index = begin * BLOCK_M + tl.arange(0, BLOCK_M)
            inside = index < M
            starts = row_starts(a.view, index, C)
            count = tl.minimum(M - begin * BLOCK_M, BLOCK_M).to(tl.float32)
            t = as_read(load_act(a, starts, left, inside, C, RELU, EVEN_C), PRECISION)
            left_pivot = tl.sum(tl.where(inside[:, None], t, 0.0), 0)[None, :] / count
            t = as_read(load_act(a, starts, right, inside, C, RELU, EVEN_C), PRECISION)
            right_pivot = tl.sum(tl.where(inside[:, None], t, 0.0), 0)[None, :] / count
        acc = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
        left_sum = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        right_sum = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for block in range(begin, end):
            index = block * BLOCK_M + tl.arange(0, BLOCK_M)
            inside = index < M
            starts = row_starts(a.view, index, C)
            x = as_read(load_act(a, starts, left, inside, C, RELU, EVEN_C), PRECISION)
            y = as_read(load_act(a, starts, right, inside, C, RELU, EVEN_C), PRECISION)
            if PIVOT:
                x, y = x - left_pivot, y - right_pivot
            x = tl.where(inside[:, None], x, 0.0).to(x.dtype)
            y = tl.where(inside[:, None], y, 0.0).to(y.dtype)
            left_sum += x.to(tl.float32)
            right_sum += y.to(tl.float32)
            acc = tl.dot(x.T, y, acc, input_precision="ieee")
        count = (tl.minimum(M, end * BLOCK_M) - begin * BLOCK_M).to(tl.float32)
        left_total, right_total = tl.sum(left_sum, 0), tl.sum(right_sum, 0)
        acc -= left_total[:, None] * (right_total / count)[None, :]
        at = squares + share.to(tl.int64) * C * C + left[:, None] * C + right[None, :]
        tl.store(at, acc, mask=(left < C)[:, None] & (right < C)[None, :])
        if up == across:
            mean = tl.sum(left_pivot, 0) + left_total / count
            tl.store(means + share * C + left, mean, mask=left < C)


@triton.jit(do_not_specialize=["shares", "rows_each", "M"])
def _merge_means(means, mean, shares, rows_each, M, C, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for first in range(0, shares, BLOCK_S):
        share = first + tl.arange(0, BLOCK_S)
        count = tl.minimum(M - share * rows_each, rows_each).to(tl.float32)
        held = (share < shares)[:, None] & (cols < C)[None, :]
        total += tl.load(means + share[:, None] * C + cols[None, :], mask=held, other=0.0) * count[:, None]
    tl.store(mean + cols, tl.sum(total, 0) / M, mask=cols < C)


@triton.jit(do_not_specialize=["shares", "rows_each", "M"])
def _merge_covariance(
    means, squares,  # of shares
    mean,  # [C] float32
    cov,  # [C, C] float32
    shares, rows_each, M, C,
    TILE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(C, BLOCK_C)
    row, cols = tl.program_id(0) // columns, tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    # Of tiles below the diagonal there is the one across.
    at = squares + tl.where(row // TILE > cols // TILE, cols * C + row, row * C + cols)[None, :]
    left, right = tl.load(mean + row), tl.load(mean + cols, mask=cols < C)
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for first in range(0, shares, BLOCK_S):
        share = first + tl.arange(0, BLOCK_S)
        count = tl.minimum(M - share * rows_each, rows_each).to(tl.float32)
        held = (share < shares)[:, None] & (cols < C)[None, :]
        x = (tl.load(means + share * C + row, mask=share < shares, other=0.0) - left)[:, None]
        y = tl.load(means + share[:, None] * C + cols[None, :], mask=held, other=0.0) - right[None, :]
        own = tl.load(at + share.to(tl.int64)[:, None] * C * C, mask=held, other=0.0)
        total += tl.where(held, own + x * y * count[:, None], 0.0)
    tl.store(cov + row * C + cols, tl.sum(total, 0) / M, mask=cols < C)


def covariance(a: Act) -> tuple[Tensor, Tensor]:
    args = _operands.act(a)
    x, channels, count = args.x, args.x.shape[1], _operands.rows(args.x)
    tile = _table.tile("covariance", x.dtype, channels, arch(x))
    columns = -(-channels // tile.channels)
    shares, each = _table.shares(count, tile.depth, columns * columns, tile.shares)
    means, squares, mean, cov = (
        torch.empty(size, dtype=torch.float32, device=x.device)
        for size in ((shares, channels), (shares, channels, channels), (channels,), (channels, channels))
    )
    launch(
        _covariance, shares * columns * columns, x, args, means, squares, count, channels, -(-count // tile.depth),
        each, RELU=_operands.relu(a), EVEN_C=channels % tile.channels == 0, PIVOT=x.dtype == torch.float32,
        PRECISION=_operands.precision(x), BLOCK_M=tile.depth, BLOCK_C=tile.channels, **tile.options,
    )
    rows_each = each * tile.depth
    launch(
        _merge_means, -(-channels // 16), x, means, mean, shares, rows_each, count, channels, BLOCK_S=BLOCK_S,
        BLOCK_C=16, num_warps=4,
    )
    block, width = merging_tile(shares, channels)
    launch(
        _merge_covariance, channels * -(-channels // width), x, means, squares, mean, cov, shares, rows_each, count,
        channels, TILE=tile.channels, BLOCK_S=block, BLOCK_C=width, num_warps=4,
    )
    return mean, cov
