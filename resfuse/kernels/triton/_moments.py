"""Means and squared deviations of rows, share by share, and sums of shares: all merged in a fixed order.

    n = n_a + n_b,  d = mean_b - mean_a,  mean = mean_a + d n_b / n,  M2 = M2_a + M2_b + d^2 n_a n_b / n   (Chan)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import Stats
from ._launch import launch

# Shares that a merging program reads at once: many loads in flight, since there is little else to hide behind.
BLOCK_S = 64


@triton.jit
def add_moments(count, mean, squares, t, inside, more):
    """Moments (count, mean [cols], squares [cols]) with those of `more` rows of a float32 tile merged in."""
    own = tl.sum(tl.where(inside[:, None], t, 0.0), 0) / more
    centred = tl.where(inside[:, None], t - own[None, :], 0.0)
    both, apart = count + more, own - mean
    mean += apart * (more / both)
    squares += tl.sum(centred * centred, 0) + apart * apart * (count * more / both)
    return both, mean, squares


@triton.jit(do_not_specialize=["shares", "rows_each", "M"])
def _merge_moments(partial, mean, var, shares, rows_each, M, C, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    # partial [shares, 2, C] float32: the mean and M2 of each share's rows; mean, var [C] float32
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (cols < C)[None, :]
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for first in range(0, shares, BLOCK_S):
        share = first + tl.arange(0, BLOCK_S)
        count = tl.minimum(M - share * rows_each, rows_each).to(tl.float32)
        held = (share < shares)[:, None] & inside
        at = partial + share[:, None] * (2 * C) + cols[None, :]
        total += tl.load(at, mask=held, other=0.0) * count[:, None]
    centre = tl.sum(total, 0) / M
    squares = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for first in range(0, shares, BLOCK_S):
        share = first + tl.arange(0, BLOCK_S)
        count = tl.minimum(M - share * rows_each, rows_each).to(tl.float32)
        held = (share < shares)[:, None] & inside
        at = partial + share[:, None] * (2 * C) + cols[None, :]
        apart = tl.load(at, mask=held, other=0.0) - centre[None, :]
        squares += tl.where(held, tl.load(at + C, mask=held, other=0.0) + apart * apart * count[:, None], 0.0)
    tl.store(mean + cols, centre, mask=cols < C)
    tl.store(var + cols, tl.sum(squares, 0) / M, mask=cols < C)


def merge_moments(partial: Tensor, rows_each: int, rows: int) -> Stats:
    """The moments of all rows. partial [shares, 2, C] of `rows_each` rows each, the last of the rest."""
    shares, _, channels = partial.shape
    stats = Stats(*torch.empty((2, channels), dtype=torch.float32, device=partial.device))
    block = 16
    launch(
        _merge_moments, -(-channels // block), partial, partial, *stats, shares, rows_each, rows, channels,
        BLOCK_S=BLOCK_S, BLOCK_C=block, num_warps=4,
    )
    return stats


@triton.jit
def sum_shares(at, shares, stride, elements, E, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr):
    """Sums [BLOCK_E] over shares of values that lie `stride` apart from one share to the next."""
    total = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    for first in range(0, shares, BLOCK_S):
        share = first + tl.arange(0, BLOCK_S)
        held = (share < shares)[:, None] & (elements < E)[None, :]
        total += tl.load(at + share.to(tl.int64)[:, None] * stride + elements[None, :], mask=held, other=0.0)
    return tl.sum(total, 0)


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
    if len(partial) <= 4 * BLOCK_S:
        return partial
    fewer = partial.new_empty((-(-len(partial) // BLOCK_S), *partial.shape[1:]))
    each, block = partial[0].numel(), 32
    launch(
        _fewer_shares, len(fewer) * -(-each // block), partial, partial, fewer, len(partial), each, BLOCK_S=BLOCK_S,
        BLOCK_E=block, num_warps=4,
    )
    return fewer
