"""bn_reduce: dbeta = sum(dy), dgamma = invstd * sum(dy * (z - mean)), dy a recipe. Reads dy and z once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import BNContext, Masked
from . import _operands, _table
from ._launch import arch, launch
from ._moments import BLOCK_S, sum_shares
from ._tiles import load_grad, load_tile, load_vector


@triton.jit(do_not_specialize=["M", "blocks", "each"])
def _bn_reduce(
    g,  # GradArgs [M, C]: what remains of dy below its ReLU
    z,  # [M, C] storage
    mean,  # [C] float32
    partial,  # [shares, 2, C] float32
    M, C, blocks, each,
    EVEN_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(C, BLOCK_C)
    share, first = tl.program_id(0) // columns, tl.program_id(0) % columns * BLOCK_C
    cols = first + tl.arange(0, BLOCK_C)
    centre = load_vector(mean, cols, C, EVEN_C)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    along = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for block in range(share * each, tl.minimum(share * each + each, blocks)):
        index = block * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = index < M
        dy = load_grad(g, index, first, inside, C, EVEN_C, BLOCK_M, BLOCK_C).to(tl.float32)
        value = load_tile(z, index.to(tl.int64) * C, cols, inside, C, EVEN_C).to(tl.float32)
        total += dy
        along += dy * (value - centre)
    at = partial + share * (2 * C) + cols
    tl.store(at, tl.sum(total, 0), mask=cols < C)
    tl.store(at + C, tl.sum(along, 0), mask=cols < C)


@triton.jit(do_not_specialize=["shares", "M"])
def _bn_vectors(partial, invstd, gamma, vectors, shares, M, C, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    # vectors [5, C] float32: dbeta, dgamma, and of dz = scale * (dy - mean_dy - (z - mean) * slope) the other three
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    total = sum_shares(partial, shares, 2 * C, cols, C, BLOCK_S, BLOCK_C)
    along = sum_shares(partial + C, shares, 2 * C, cols, C, BLOCK_S, BLOCK_C)
    inverse = tl.load(invstd + cols, mask=inside)
    scale = inverse
    if gamma is not None:
        scale *= tl.load(gamma + cols, mask=inside).to(tl.float32)
    tl.store(vectors + cols, total, mask=inside)
    tl.store(vectors + C + cols, along * inverse, mask=inside)
    tl.store(vectors + 2 * C + cols, total / M, mask=inside)
    tl.store(vectors + 3 * C + cols, along * inverse * inverse / M, mask=inside)
    tl.store(vectors + 4 * C + cols, scale, mask=inside)


def partial_sums(g: _operands.GradArgs, z: Tensor, mean: Tensor) -> Tensor:
    """[shares, 2, C]: sum(dy) and sum(dy * (z - mean)) of each share of the rows."""
    _operands.check_rows(z=z)
    count, channels = _operands.rows(z), z.shape[1]
    tile = _table.tile("elements", z.dtype, channels, arch(z))
    columns = -(-channels // tile.channels)
    shares, each = _table.shares(count, tile.rows, columns, tile.shares)
    partial = torch.empty((shares, 2, channels), dtype=torch.float32, device=z.device)
    launch(
        _bn_reduce, shares * columns, z, g, z, _operands.vector(mean), partial, count, channels,
        -(-count // tile.rows), each, EVEN_C=channels % tile.channels == 0, BLOCK_M=tile.rows, BLOCK_C=tile.channels,
        **tile.options,
    )
    return partial


def bn_vectors(partial: Tensor, count: int, context: BNContext) -> Tensor:
    """[5, C]: dbeta, dgamma, mean_dy, slope, scale, from the sums of shares of `count` rows."""
    invstd, gamma = _operands.vector(context.invstd), _operands.vector(context.gamma)
    shares, _, channels = partial.shape
    vectors = torch.empty((5, channels), dtype=torch.float32, device=partial.device)
    block = 16
    launch(
        _bn_vectors, -(-channels // block), partial, partial, invstd, gamma, vectors, shares, count, channels,
        BLOCK_S=BLOCK_S, BLOCK_C=block, num_warps=4,
    )
    return vectors


def bn_reduce(dy: Tensor | Masked, z: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    sums = partial_sums(_operands.grad(dy), z, mean)
    dbeta, dgamma, *_ = bn_vectors(sums, _operands.rows(z), BNContext(mean, invstd, None, True))
    return dbeta, dgamma
