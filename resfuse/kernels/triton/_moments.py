"""Means and squared deviations of rows, share by share, and sums of shares: all merged in a fixed order.

    n = n_a + n_b,  d = mean_b - mean_a,  mean = mean_a + d n_b / n,  M2 = M2_a + M2_b + d^2 n_a n_b / n   (Chan)
"""

import triton
import triton.language as tl
from torch import Tensor

from ..interface import Stats
from ._launch import launch
from ._tiles import load_vector

# Shares that a merging program reads at once: many loads in flight, since there is little else to hide behind.
BLOCK_S = 64
MANY = 4 * BLOCK_S  # shares beyond which many programs merge them to fewer first


@triton.jit
def tile_moments(t, inside, count):
    """Mean and M2 [cols] of the `count` rows of a float32 tile that exist."""
    mean = tl.sum(tl.where(inside[:, None], t, 0.0), 0) / count
    centred = tl.where(inside[:, None], t - mean[None, :], 0.0)
    return mean, tl.sum(centred * centred, 0)


@triton.jit
def store_moments(partial, share, cols, channels, limit, mean, squares):
    """A share's moments into partial [shares, 2, channels], those of columns before `limit`."""
    at = partial + share.to(tl.int64) * (2 * channels) + cols
    tl.store(at, mean, mask=cols < limit)
    tl.store(at + channels, squares, mask=cols < limit)


@triton.jit
def store_output(
    z, partial, acc, block, index, cols, inside, M, channels, limit, EVEN: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Store a product's tile in storage dtype, its columns before `limit`, and the moments of what was stored as its
    block's share, if partial [blocks of rows, 2, channels] is given."""
    t = acc.to(z.dtype.element_ty)
    held = inside[:, None] if EVEN else inside[:, None] & (cols < limit)[None, :]
    tl.store(z + index.to(tl.int64)[:, None] * channels + cols[None, :], t, mask=held)
    if partial is not None:
        count = tl.minimum(M - block * BLOCK_M, BLOCK_M).to(tl.float32)
        mean, squares = tile_moments(t.to(tl.float32), inside, count)
        store_moments(partial, block, cols, channels, limit, mean, squares)


@triton.jit
def store_gradient(da, partial, t, x, mean, block, index, cols, inside, channels, limit, EVEN: tl.constexpr):
    """Store a gradient's tile in storage dtype, its columns before `limit`, and the sums of it and of it times
    (x - mean) as its block's share, if partial [blocks of rows, 2, channels] is given."""
    t = t.to(da.dtype.element_ty)
    held = inside[:, None] if EVEN else inside[:, None] & (cols < limit)[None, :]
    tl.store(da + index.to(tl.int64)[:, None] * channels + cols[None, :], t, mask=held)
    if partial is not None:
        dy = tl.where(inside[:, None], t.to(tl.float32), 0.0)
        along = dy * (x.to(tl.float32) - load_vector(mean, cols, limit, EVEN))
        store_moments(partial, block, cols, channels, limit, tl.sum(dy, 0), tl.sum(along, 0))


@triton.jit(do_not_specialize=["shares", "group", "rows_each", "M"])
def _merge_moments(
    partial,  # [shares, 2, C] float32: mean and M2 of each share's rows
    merged,  # [groups, 2, C] float32: those of `group` shares each; where FINAL, of all: mean and variance
    shares, group, rows_each, M, C,
    FINAL: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(C, BLOCK_C)
    begin = tl.program_id(0) // columns * group
    end = tl.minimum(begin + group, shares)
    rows = (tl.minimum(M, end * rows_each) - begin * rows_each).to(tl.float32)
    cols = tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for first in range(begin, end, BLOCK_S):
        share = first + tl.arange(0, BLOCK_S)
        count = tl.minimum(M - share * rows_each, rows_each).to(tl.float32)
        held = (share < end)[:, None] & (cols < C)[None, :]
        at = partial + share.to(tl.int64)[:, None] * (2 * C) + cols[None, :]
        total += tl.load(at, mask=held, other=0.0) * count[:, None]
    mean = tl.sum(total, 0) / rows
    spread = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for first in range(begin, end, BLOCK_S):
        share = first + tl.arange(0, BLOCK_S)
        count = tl.minimum(M - share * rows_each, rows_each).to(tl.float32)
        held = (share < end)[:, None] & (cols < C)[None, :]
        at = partial + share.to(tl.int64)[:, None] * (2 * C) + cols[None, :]
        apart = tl.load(at, mask=held, other=0.0) - mean[None, :]
        spread += tl.where(held, tl.load(at + C, mask=held, other=0.0) + apart * apart * count[:, None], 0.0)
    squares = tl.sum(spread, 0)
    if FINAL:
        squares /= rows
    store_moments(merged, tl.program_id(0) // columns, cols, C, C, mean, squares)


def merge_moments(partial: Tensor, rows_each: int, rows: int) -> Stats:
    """The moments of all rows. partial [shares, 2, C] of `rows_each` rows each, the last of the rest."""
    shares, _, channels = partial.shape
    if shares > MANY:
        partial, rows_each = _merged(partial, BLOCK_S, rows_each, rows, False), rows_each * BLOCK_S
    return Stats(*_merged(partial, len(partial), rows_each, rows, True)[0])


def _merged(partial: Tensor, group: int, rows_each: int, rows: int, final: bool) -> Tensor:
    shares, _, channels = partial.shape
    merged, block = partial.new_empty((-(-shares // group), 2, channels)), 16
    launch(
        _merge_moments, len(merged) * -(-channels // block), partial, partial, merged, shares, group, rows_each, rows,
        channels, FINAL=final, BLOCK_S=BLOCK_S, BLOCK_C=block, num_warps=4,
    )
    return merged


@triton.jit
def sum_shares(at, shares, stride, elements, E, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr):
    """Sums [BLOCK_E] over shares of values that lie `stride` apart from one share to the next."""
    total = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    for first in range(0, shares, BLOCK_S):
        share = first + tl.arange(0, BLOCK_S)
        held = (share < shares)[:, None] & (elements < E)[None, :]
        total += tl.load(at + share.to(tl.int64)[:, None] * stride + elements[None, :], mask=held, other=0.0)
    return tl.sum(total, 0)


def merging_tile(shares: int, channels: int) -> tuple[int, int]:
    """(shares at once, columns) of a program that adds up a row of matrices: 16 values a thread of 128."""
    block = min(32, triton.next_power_of_2(shares))
    return block, min(2048 // block, triton.next_power_of_2(channels))


@triton.jit(do_not_specialize=["shares"])
def _fewer_shares(partial, fewer, shares, E, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr):
    # partial [shares, E], fewer [ceil(shares / BLOCK_S), E] float32
    columns = tl.cdiv(E, BLOCK_E)
    first = tl.program_id(0) // columns * BLOCK_S
    element = tl.program_id(0) % columns * BLOCK_E + tl.arange(0, BLOCK_E)
    own = tl.minimum(shares - first, BLOCK_S)
    total = sum_shares(partial + first.to(tl.int64) * E, own, E, element, E, BLOCK_S, BLOCK_E)
    tl.store(fewer + tl.program_id(0) // columns * E + element, total, mask=element < E)


def fewer_shares(partial: Tensor) -> Tensor:
    """Sums [shares, ...] added up to few shares, by many programs: the one that adds those would take long for all."""
    if len(partial) <= MANY:
        return partial
    fewer = partial.new_empty((-(-len(partial) // BLOCK_S), *partial.shape[1:]))
    each, block = partial[0].numel(), 32
    launch(
        _fewer_shares, len(fewer) * -(-each // block), partial, partial, fewer, len(partial), each, BLOCK_S=BLOCK_S,
        BLOCK_E=block, num_warps=4,
    )
    return fewer
