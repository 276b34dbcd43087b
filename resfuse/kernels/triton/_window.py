"""Convolutions with a window as products: each tap is a 1x1 of shifted rows, summed in one tile.

    z[m] = sum over taps of act(x)[m shifted] @ W[tap].T,        0 where the shifted row is padding
    da[m] = sum over taps of dz[m shifted back] @ W[tap]         stride 1
    dweight[tap] = dz.T @ act(x)[shifted]                        in shares of the rows

Padding is 0 after BatchNorm and ReLU. Rows that are padding are read as 0, and their shift is multiplied by 0 from a
table [taps, pixels]: a predicate made of indices would send the operand of each step through shared memory.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import Act, Geometry, Grad, Norm, Stats, Summed
from . import _operands, _table
from ._launch import arch, launch
from ._moments import fewer_shares, merge_moments, store_gradient, tile_moments
from ._outer_product import merge_products
from ._tiles import activate, as_read, load_grad, load_tile, load_vector, rectify


@triton.jit(do_not_specialize=["M"])
def _conv_window(
    a,  # ActArgs [N*H*W, C]
    weight,  # [K, taps, C / groups] storage
    valid,  # [taps, P*Q] float32
    z,  # [M = N*P*Q, K] storage
    partial,  # [blocks of rows, 2, K] float32, or None
    w,  # WindowArgs
    M, C, K, inner, outer,  # channels of a group
    RELU: tl.constexpr, EVEN_C: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(outer, BLOCK_N)
    block, column = tl.program_id(0) // (columns * (C // inner)), tl.program_id(0) % (columns * (C // inner))
    group, own = column // columns, column % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    index = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside, pixels = index < M, w.out_height * w.out_width
    pixel = index % pixels
    line, place = pixel // w.out_width * w.down - w.top, pixel % w.out_width * w.right - w.left
    start = (index // pixels).to(tl.int64) * (w.height * w.width) + line * w.width + place
    chunks = tl.cdiv(inner, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    steps = w.rows * w.columns * chunks
    tl.assume(steps > 0)
    for i in range(0, steps):
        tap, depth = i // chunks, i % chunks * BLOCK_K + tl.arange(0, BLOCK_K)
        down, right = tap // w.columns * w.apart, tap % w.columns * w.across
        there = inside & (line + down >= 0) & (line + down < w.height)
        there = there & (place + right >= 0) & (place + right < w.width)
        t = load_tile(a.x + group * inner, (start + down * w.width + right) * C, depth, there, inner, EVEN_C)
        if a.scale is not None:
            scale = load_vector(a.scale + group * inner, depth, inner, EVEN_C)
            shift = load_vector(a.shift + group * inner, depth, inner, EVEN_C)
            known = tl.load(valid + tap * pixels + pixel)
            y = tl.fma(t.to(tl.float32), scale, shift * known[:, None])
            if RELU:
                y = rectify(y)
            t = y.to(t.dtype)
        at = weight + (group * outer + own)[:, None] * (w.rows * w.columns * inner) + (tap * inner + depth)[None, :]
        if EVEN_C and EVEN_K:
            f = tl.load(at)
        else:
            f = tl.load(at, mask=(own < outer)[:, None] & (depth < inner)[None, :], other=0.0)
        acc = tl.dot(as_read(t, PRECISION), as_read(f, PRECISION).T, acc, input_precision=PRECISION)
    t = (acc + 0.0).to(z.dtype.element_ty)
    held = inside[:, None] if EVEN_K else inside[:, None] & (own < outer)[None, :]
    tl.store(z + index.to(tl.int64)[:, None] * K + (group * outer + own)[None, :], t, mask=held)
    if partial is not None:
        count = tl.minimum(M - block * BLOCK_M, BLOCK_M).to(tl.float32)
        mean, squares = tile_moments(t.to(tl.float32), inside, count)
        at = partial + block.to(tl.int64) * (2 * K) + group * outer + own
        tl.store(at, mean, mask=own < outer)
        tl.store(at + K, squares, mask=own < outer)


@triton.jit(do_not_specialize=["M"])
def _conv_window_dgrad(
    g,  # GradArgs [N*P*Q, K]
    weight,  # [K, taps, C] storage
    valid,  # [taps, H*W] float32
    a,  # ActArgs [M, C] whose ReLU masks da, or nothing
    mean,  # [C] float32
    da,  # [M = N*H*W, C] storage
    partial,  # [blocks of rows, 2, C] float32: sum(da), sum(da * (x - mean)); or None
    w,  # WindowArgs
    M, K, C,
    EVEN_K: tl.constexpr, EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(C, BLOCK_N)
    block = tl.program_id(0) // columns
    cols = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    index = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside, pixels = index < M, w.height * w.width
    pixel = index % pixels
    line, place = pixel // w.width + w.top, pixel % w.width + w.left
    start = index // pixels * (w.out_height * w.out_width) + line * w.out_width + place
    chunks = tl.cdiv(K, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    steps = w.rows * w.columns * chunks
    tl.assume(steps > 0)
    for i in range(0, steps):
        tap, first = i // chunks, i % chunks * BLOCK_K
        down, right = tap // w.columns * w.apart, tap % w.columns * w.across
        there = inside & (line - down >= 0) & (line - down < w.out_height)
        there = there & (place - right >= 0) & (place - right < w.out_width)
        known = tl.load(valid + tap * pixels + pixel)
        row = start - down * w.out_width - right
        t = load_grad(g, row, first, there, K, EVEN_K, BLOCK_M, BLOCK_K, known)
        depth = first + tl.arange(0, BLOCK_K)
        at = weight + depth[:, None] * (w.rows * w.columns * C) + (tap * C + cols)[None, :]
        if EVEN_C and EVEN_K:
            f = tl.load(at)
        else:
            f = tl.load(at, mask=(depth < K)[:, None] & (cols < C)[None, :], other=0.0)
        acc = tl.dot(as_read(t, PRECISION), as_read(f, PRECISION), acc, input_precision=PRECISION)
    acc += 0.0
    x = acc
    if a.x is not None:
        x = load_tile(a.x, index.to(tl.int64) * C, cols, inside, C, EVEN_C)
        y = activate(x, load_vector(a.scale, cols, C, EVEN_C), load_vector(a.shift, cols, C, EVEN_C), True)
        acc = tl.where(y <= 0, 0.0, acc)
    store_gradient(da, partial, acc, x, mean, block, index, cols, inside, C, EVEN_C)


@triton.jit(do_not_specialize=["M", "blocks", "each"])
def _conv_window_wgrad(
    g,  # GradArgs [M = N*P*Q, K]
    a,  # ActArgs [N*H*W, C]
    products,  # [shares, K, taps, C] float32
    w,  # WindowArgs
    M, K, C, blocks, each,
    RELU: tl.constexpr, EVEN_K: tl.constexpr, EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    columns, taps = tl.cdiv(C, BLOCK_C), w.rows * w.columns
    tiles = tl.cdiv(K, BLOCK_K) * columns * taps
    share, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    tap, first = tile % taps, tile // taps // columns * BLOCK_K
    outer, inner = first + tl.arange(0, BLOCK_K), tile // taps % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    pixels = w.out_height * w.out_width
    down, right = tap // w.columns * w.apart - w.top, tap % w.columns * w.across - w.left
    acc = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for block in range(share * each, tl.minimum(share * each + each, blocks)):
        index = block * BLOCK_M + tl.arange(0, BLOCK_M)
        pixel = index % pixels
        line, place = pixel // w.out_width * w.down + down, pixel % w.out_width * w.right + right
        there = (index < M) & (line >= 0) & (line < w.height) & (place >= 0) & (place < w.width)
        t = load_grad(g, index, first, there, K, EVEN_K, BLOCK_M, BLOCK_K)
        row = (index // pixels).to(tl.int64) * (w.height * w.width) + line * w.width + place
        x = load_tile(a.x, row * C, inner, there, C, EVEN_C)
        if a.scale is not None:
            x = activate(x, load_vector(a.scale, inner, C, EVEN_C), load_vector(a.shift, inner, C, EVEN_C), RELU)
        # Operands of transposed products go through shared memory: a predicate costs nothing more.
        t = tl.where(there[:, None], t, 0.0).to(t.dtype)
        x = tl.where(there[:, None], x, 0.0).to(x.dtype)
        acc = tl.dot(as_read(t, PRECISION).T, as_read(x, PRECISION), acc, input_precision=PRECISION)
    held = (outer < K)[:, None] & (inner < C)[None, :]
    at = products + share.to(tl.int64) * K * taps * C + outer[:, None] * (taps * C) + (tap * C + inner)[None, :]
    tl.store(at, acc, mask=held)


def conv_window(a: Act, weight: Tensor, geometry: Geometry, stats: bool) -> tuple[Tensor, Stats | None]:
    """z of any convolution, and its moments."""
    args, (outputs, inner, *size) = _operands.act(a), weight.shape
    x, groups = args.x, geometry.groups
    _operands.check_rows(a=x)
    height, width = geometry.spatial(x.shape[2:], weight.shape[2:])
    z = torch.empty(
        (x.shape[0], outputs, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    window = _operands.window_args(x, height, width, (tuple(size), *geometry[:3]))
    count, outer = _operands.rows(z), outputs // groups
    tile = _table.tile("conv_window", z.dtype, outer, arch(z))
    blocks, columns = -(-count // tile.rows), -(-outer // tile.channels)
    partial = torch.empty((blocks, 2, outputs), dtype=torch.float32, device=z.device) if stats else None
    launch(
        _conv_window, blocks * columns * groups, z, args, _taps(weight), valid_rows(window, z.device), z, partial,
        window, count, x.shape[1], outputs, inner, outer, RELU=_operands.relu(a), EVEN_C=inner % tile.depth == 0,
        EVEN_K=outer % tile.channels == 0, PRECISION=_operands.precision(z), BLOCK_M=tile.rows, BLOCK_N=tile.channels,
        BLOCK_K=tile.depth, **tile.options,
    )
    return z, merge_moments(partial, tile.rows, count) if stats else None


def conv_window_dgrad(
    grad: Grad, a: Act, weight: Tensor, geometry: Geometry, mean: Tensor | None
) -> Tensor | Summed:
    """da, stride 1 and no groups; if a's ReLU has a BatchNorm of that mean under it, masked and with its sums."""
    args, (outer, channels, *size) = _operands.grad(grad), weight.shape
    x = a.z if isinstance(a, Norm) else a
    window = _operands.window_args(x, *args.dout.shape[2:], (tuple(size), *geometry[:3]))
    da, count = _operands.empty_rows(x, channels), _operands.rows(x)
    tile = _table.tile("conv_window_dgrad", da.dtype, channels, arch(da))
    blocks, columns = -(-count // tile.rows), -(-channels // tile.channels)
    summed = mean is not None and _operands.relu(a)
    partial = torch.empty((blocks, 2, channels), dtype=torch.float32, device=da.device) if summed else None
    launch(
        _conv_window_dgrad, blocks * columns, da, args, _taps(weight), valid_places(window, da.device),
        _operands.act(a) if summed else _operands.NO_ACT, mean if summed else None, da, partial, window, count, outer,
        channels, EVEN_K=outer % tile.depth == 0, EVEN_C=channels % tile.channels == 0,
        PRECISION=_operands.precision(da), BLOCK_M=tile.rows, BLOCK_N=tile.channels, BLOCK_K=tile.depth,
        **tile.options,
    )
    return Summed(da, fewer_shares(partial)) if summed else da


def conv_window_wgrad(grad: Grad, a: Act, weight: Tensor, geometry: Geometry) -> Tensor:
    """dweight in float32, no groups."""
    left, right, (outer, inner, *size) = _operands.grad(grad), _operands.act(a), weight.shape
    _operands.check_rows(a=right.x)
    window = _operands.window_args(right.x, *left.dout.shape[2:], (tuple(size), *geometry[:3]))
    count, taps = _operands.rows(left.dout), size[0] * size[1]
    tile = _table.tile("outer_product", right.x.dtype, inner, arch(right.x))
    tiles = -(-outer // tile.rows) * -(-inner // tile.channels) * taps
    shares, each = _table.shares(count, tile.depth, tiles)
    products = torch.empty((shares, outer, taps, inner), dtype=torch.float32, device=right.x.device)
    launch(
        _conv_window_wgrad, shares * tiles, right.x, left, right, products, window, count, outer, inner,
        -(-count // tile.depth), each, RELU=_operands.relu(a), EVEN_K=outer % tile.rows == 0,
        EVEN_C=inner % tile.channels == 0, PRECISION=_operands.precision(right.x), BLOCK_M=tile.depth,
        BLOCK_K=tile.rows, BLOCK_C=tile.channels, **tile.options,
    )
    result, _ = merge_products(products.view(shares, outer, taps * inner), None, None)
    return result.view(outer, *size, inner).permute(0, 3, 1, 2)


def _taps(weight: Tensor) -> Tensor:
    """[K, R, S, C]: a tap's channels one after the other."""
    return weight.permute(0, 2, 3, 1).contiguous()


@lru_cache(64)
def valid_rows(w: _operands.WindowArgs, device: torch.device) -> Tensor:
    """[taps, P*Q] float32: 1 where the tap of an output pixel lies inside, 0 where it is padding."""
    return _valid(
        w.rows, w.columns, w.out_height, w.out_width, w.height, w.width, device,
        lambda r, p: p * w.down - w.top + r * w.apart, lambda s, q: q * w.right - w.left + s * w.across,
    )


@lru_cache(64)
def valid_places(w: _operands.WindowArgs, device: torch.device) -> Tensor:
    """[taps, H*W] float32: 1 where the output pixel that reads an input pixel by the tap exists; stride 1."""
    return _valid(
        w.rows, w.columns, w.height, w.width, w.out_height, w.out_width, device,
        lambda r, h: h + w.top - r * w.apart, lambda s, v: v + w.left - s * w.across,
    )


def _valid(rows, columns, height, width, limit_height, limit_width, device, line, place) -> Tensor:
    r, s, h, v = (
        torch.arange(size, device=device).view([-1 if i == j else 1 for j in range(4)])
        for i, size in enumerate((rows, columns, height, width))
    )
    down, across = line(r, h), place(s, v)
    there = (down >= 0) & (down < limit_height) & (across >= 0) & (across < limit_width)
    return there.float().flatten().contiguous()
