"""Sums over rows of products, g.T @ a: weight gradients of 1x1 convolutions, and P of the covariance form.

    products = g.T @ (a - mean),  sums = sum(g)

Each share of the rows gives its own, added in order afterwards. Reads g once for each column of tiles and a once for
each row of them. float32 subtracts the mean before the product; 16 bits after it, sum(g) mean.T from the exact sums.
Of tensors as they are it is the vendor's product where that was measured faster.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import Act, Grad
from . import _operands, _table
from ._launch import arch, launch
from ._moments import merging_tile, sum_shares
from ._tiles import as_read, load_act, load_grad, load_vector, row_starts


@triton.jit(do_not_specialize=["M", "blocks", "each"])
def _outer_product(
    g,  # GradArgs [M, K]
    a,  # ActArgs [M, C]
    mean,  # [C] float32, or None
    products,  # [shares, K, C] float32
    sums,  # [shares, K] float32, or None
    M, K, C, blocks, each,
    RELU: tl.constexpr, EVEN_K: tl.constexpr, EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(C, BLOCK_C)
    tiles = tl.cdiv(K, BLOCK_K) * columns
    share, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    first = tile // columns * BLOCK_K
    outer, inner = first + tl.arange(0, BLOCK_K), tile % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for block in range(share * each, tl.minimum(share * each + each, blocks)):
        index = block * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = index < M
        t = load_grad(g, index, first, inside, K, EVEN_K, BLOCK_M, BLOCK_K)
        t = as_read(tl.where(inside[:, None], t, 0.0).to(t.dtype), PRECISION)
        x = load_act(a, row_starts(a.view, index, C), inner, inside, C, RELU, EVEN_C)
        if mean is not None:
            x -= load_vector(mean, inner, C, EVEN_C)
        x = as_read(tl.where(inside[:, None], x, 0.0).to(x.dtype), PRECISION)
        acc = tl.dot(t.T, x, acc, input_precision=PRECISION)
        if sums is not None:
            total += t.to(tl.float32)
    held = (outer < K)[:, None] & (inner < C)[None, :]
    tl.store(products + share.to(tl.int64) * K * C + outer[:, None] * C + inner[None, :], acc, mask=held)
    if sums is not None:
        if tile % columns == 0:
            tl.store(sums + share * K + outer, tl.sum(total, 0), mask=outer < K)


@triton.jit(do_not_specialize=["shares"])
def _merge(
    products, sums,  # of shares
    mean,  # [C] float32, or None: still to be subtracted
    result,  # [K, C] float32
    total,  # [K] float32, or None
    shares, K, C,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(C, BLOCK_C)
    row, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    cols = column * BLOCK_C + tl.arange(0, BLOCK_C)
    value = sum_shares(products + row * C, shares, K * C, cols, C, BLOCK_S, BLOCK_C)
    if total is not None:
        one = tl.arange(0, 1)
        along = sum_shares(sums + row, shares, K, one, 1, BLOCK_S, 1)
        if mean is not None:
            value -= along * tl.load(mean + cols, mask=cols < C)
        if column == 0:
            tl.store(total + row + one, along)
    tl.store(result + row * C + cols, value, mask=cols < C)


def outer_product(g: Grad, a: Act, mean: Tensor | None, sums: bool) -> tuple[Tensor, Tensor | None]:
    """(g.T @ (a - mean) [K, C], sum(g) [K] if asked), float32; the vendor's rounds to storage, as eager's does."""
    left, right = _operands.grad(g), _operands.act(a)
    x, count, outer, inner = right.x, _operands.rows(right.x), left.dout.shape[1], right.x.shape[1]
    plain = isinstance(g, Tensor) and right.scale is None and right.view is None
    if plain and mean is None and not sums and _table.by_vendor(x, outer, inner, arch(x)):
        return _matrix(g).t() @ _matrix(x), None
    centred = mean is not None and x.dtype == torch.float32
    name = "outer_product of tensors" if plain else "outer_product"
    tile = _table.tile(name, x.dtype, inner, arch(x), outer)
    tiles = -(-outer // tile.rows) * -(-inner // tile.channels)
    shares, each = _table.shares(count, tile.depth, tiles, tile.shares)
    products = torch.empty((shares, outer, inner), dtype=torch.float32, device=x.device)
    partial = products.new_empty((shares, outer)) if sums else None
    launch(
        _outer_product, shares * tiles, x, left, right, mean if centred else None, products, partial, count, outer,
        inner, -(-count // tile.depth), each, RELU=_operands.relu(a), EVEN_K=outer % tile.rows == 0,
        EVEN_C=inner % tile.channels == 0, PRECISION=_operands.precision(x), BLOCK_M=tile.depth, BLOCK_K=tile.rows,
        BLOCK_C=tile.channels, **tile.options,
    )
    return merge_products(products, partial, None if centred else mean)


def _matrix(t: Tensor) -> Tensor:
    """[M, C] of a tensor dense in channels_last."""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def merge_products(products: Tensor, sums: Tensor | None, mean: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Sums over shares of products [shares, K, C], less sum(g) mean.T if a mean is given, and of sums [shares, K]."""
    shares, outer, inner = products.shape
    result, total = products.new_empty((outer, inner)), None if sums is None else products.new_empty(outer)
    block, width = merging_tile(shares, inner)
    launch(
        _merge, outer * -(-inner // width), products, products, sums, mean, result, total, shares, outer, inner,
        BLOCK_S=block, BLOCK_C=width, num_warps=4,
    )
    return result, total
