"""Convolutions with a window as products: each tap is a 1x1 of shifted rows, summed in one tile.

    z[m] = sum over taps of act(x)[m shifted] @ W[tap].T,        0 where the shifted row is padding
    da[m] = sum over taps of dz[m shifted back] @ W[tap]
    dweight[tap] = dz.T @ act(x)[shifted]                        in shares of the rows

Padding is 0 after BatchNorm and ReLU. Rows that are padding are read as 0, and their shift is multiplied by 0 from a
table [taps, pixels]: a predicate made of indices would send the operand of each step through shared memory.

With a stride an input pixel is read by some of the taps only: by the same ones as all pixels of its phase, that is its
place modulo the stride. A program of the input gradient has rows of one phase, and only its taps. Groups have tiles of
their own.
"""

from functools import lru_cache
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import Act, BNGrad, Geometry, Grad, Masked, Norm, Stats, Summed
from . import _operands, _table
from ._launch import arch, launch
from ._moments import fewer_shares, merge_moments, store_gradient, store_output
from ._outer_product import merge_products
from ._tiles import activate, as_read, load_grad, load_tile, load_vector, rectify
from .select import written


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
    cols, limit = group * outer + own, group * outer + outer
    store_output(z, partial, acc + 0.0, block, index, cols, inside, M, K, limit, EVEN_K, BLOCK_M)


@triton.jit(do_not_specialize=["M", "each"])
def _conv_window_dgrad(
    g,  # GradArgs [N*P*Q, K]
    weight,  # [K, taps, C / groups] storage
    valid,  # [taps, H*W] float32
    firsts,  # [down + right] int32: the first tap of each phase, by lines and by columns; or None with stride 1
    a,  # ActArgs [N*H*W, C] whose ReLU masks da, or nothing
    mean,  # [C] float32
    da,  # [N*H*W, C] storage
    partial,  # [blocks of rows, 2, C] float32: sum(da), sum(da * (x - mean)); or None
    w,  # WindowArgs
    M,  # rows of a phase: N * ceil(H / down) * ceil(W / right)
    each,  # blocks of them
    K, C, outer, inner,  # channels, and those of a group
    row_step, column_step,  # from a phase's tap to its next
    EVEN_K: tl.constexpr, EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(inner, BLOCK_N)
    tiles = columns * (C // inner)
    block, column = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    group = column // columns
    cols, limit = group * inner + column % columns * BLOCK_N + tl.arange(0, BLOCK_N), group * inner + inner
    position = block % each * BLOCK_M + tl.arange(0, BLOCK_M)
    inside, taps = position < M, w.rows * w.columns
    if firsts is None:
        row, tap_column, down_taps, across_taps = 0, 0, w.rows, w.columns
        pixel = position % (w.height * w.width)
        line, place = pixel // w.width, pixel % w.width
        sample = position // (w.height * w.width)
    else:
        phase, wide = block // each, tl.cdiv(w.width, w.right)
        row, tap_column = tl.load(firsts + phase // w.right), tl.load(firsts + w.down + phase % w.right)
        down_taps = tl.maximum(tl.cdiv(w.rows - row, row_step), 1)
        across_taps = tl.maximum(tl.cdiv(w.columns - tap_column, column_step), 1)
        compact = tl.cdiv(w.height, w.down) * wide
        line = position % compact // wide * w.down + phase // w.right
        place = position % wide * w.right + phase % w.right
        sample, pixel = position // compact, line * w.width + place
        inside = inside & (line < w.height) & (place < w.width)
        pixel = tl.where(inside, pixel, 0)
    index = sample * (w.height * w.width) + pixel
    line, place = line + w.top, place + w.left
    chunks = tl.cdiv(outer, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    steps = down_taps * across_taps * chunks
    tl.assume(steps > 0)
    for i in range(0, steps):
        r, s = row + i // chunks // across_taps * row_step, tap_column + i // chunks % across_taps * column_step
        down, across, first = line - r * w.apart, place - s * w.across, i % chunks * BLOCK_K
        tap = r * w.columns + s
        there = inside & (down >= 0) & (across >= 0)
        if firsts is not None:
            there = there & (r < w.rows) & (s < w.columns)  # a phase without taps has one that is nobody's
            tap = tl.minimum(tap, taps - 1)
        down, across = down // w.down, across // w.right
        there = there & (down < w.out_height) & (across < w.out_width)
        known = tl.load(valid + tap * (w.height * w.width) + pixel)
        at = (sample * w.out_height + down) * w.out_width + across
        start = group * outer
        t = load_grad(g, at, start + first, there, K, EVEN_K, BLOCK_M, BLOCK_K, known, start + outer)
        depth = first + tl.arange(0, BLOCK_K)
        to = weight + (start + depth)[:, None] * (taps * inner) + (tap * inner - group * inner + cols)[None, :]
        if EVEN_C and EVEN_K:
            f = tl.load(to)
        else:
            f = tl.load(to, mask=(depth < outer)[:, None] & (cols < limit)[None, :], other=0.0)
        acc = tl.dot(as_read(t, PRECISION), as_read(f, PRECISION), acc, input_precision=PRECISION)
    acc += 0.0
    x = acc
    if a.x is not None:
        x = load_tile(a.x, index.to(tl.int64) * C, cols, inside, limit, EVEN_C)
        y = activate(x, load_vector(a.scale, cols, limit, EVEN_C), load_vector(a.shift, cols, limit, EVEN_C), True)
        acc = tl.where(y <= 0, 0.0, acc)
    store_gradient(da, partial, acc, x, mean, block, index, cols, inside, C, limit, EVEN_C)


@triton.jit(do_not_specialize=["M", "blocks", "each"])
def _conv_window_wgrad(
    g,  # GradArgs [M = N*P*Q, K]
    a,  # ActArgs [N*H*W, C]
    products,  # [shares, K, taps, C / groups] float32
    w,  # WindowArgs
    M, K, C, outer, inner,  # channels, and those of a group
    blocks, each,
    RELU: tl.constexpr, EVEN_K: tl.constexpr, EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    columns, taps = tl.cdiv(inner, BLOCK_C), w.rows * w.columns
    own = tl.cdiv(outer, BLOCK_K) * columns
    tiles = own * taps * (C // inner)
    share, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    tap, group, tile = tile % taps, tile // taps // own, tile // taps % own
    first, begin = tile // columns * BLOCK_K, tile % columns * BLOCK_C
    pixels = w.out_height * w.out_width
    down, right = tap // w.columns * w.apart - w.top, tap % w.columns * w.across - w.left
    cols = group * inner + begin + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for block in range(share * each, tl.minimum(share * each + each, blocks)):
        index = block * BLOCK_M + tl.arange(0, BLOCK_M)
        pixel = index % pixels
        line, place = pixel // w.out_width * w.down + down, pixel % w.out_width * w.right + right
        there = (index < M) & (line >= 0) & (line < w.height) & (place >= 0) & (place < w.width)
        t = load_grad(g, index, group * outer + first, there, K, EVEN_K, BLOCK_M, BLOCK_K)
        row = (index // pixels).to(tl.int64) * (w.height * w.width) + line * w.width + place
        x = load_tile(a.x, row * C, cols, there, C, EVEN_C)
        if a.scale is not None:
            x = activate(x, load_vector(a.scale, cols, C, EVEN_C), load_vector(a.shift, cols, C, EVEN_C), RELU)
        # Operands of transposed products go through shared memory: a predicate costs nothing more.
        t = tl.where(there[:, None], t, 0.0).to(t.dtype)
        x = tl.where(there[:, None], x, 0.0).to(x.dtype)
        acc = tl.dot(as_read(t, PRECISION).T, as_read(x, PRECISION), acc, input_precision=PRECISION)
    # Columns beyond the group's are another's, and are not stored.
    outputs, inputs = first + tl.arange(0, BLOCK_K), begin + tl.arange(0, BLOCK_C)
    at = products + share.to(tl.int64) * K * taps * inner + (group * outer + outputs)[:, None] * (taps * inner)
    held = (outputs < outer)[:, None] & (inputs < inner)[None, :]
    tl.store(at + (tap * inner + inputs)[None, :], acc, mask=held)


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
    """da; if a's ReLU has a BatchNorm of that mean under it, masked and with its sums."""
    x, groups = a.z if isinstance(a, Norm) else a, geometry.groups
    args, (outputs, inner, *size) = _operands.grad(_unmasked(grad, groups)), weight.shape
    window = _operands.window_args(x, *args.dout.shape[2:], (tuple(size), *geometry[:3]))
    channels, outer, (down, right) = inner * groups, outputs // groups, geometry.stride
    da, count = _operands.empty_rows(x, channels), x.shape[0] * -(-x.shape[2] // down) * -(-x.shape[3] // right)
    tile = _table.tile("conv_window_dgrad", da.dtype, inner, arch(da))
    each, columns = -(-count // tile.rows), -(-inner // tile.channels)
    blocks, summed = each * down * right, mean is not None and _operands.relu(a)
    partial = torch.empty((blocks, 2, channels), dtype=torch.float32, device=da.device) if summed else None
    launch(
        _conv_window_dgrad, blocks * columns * groups, da, args, _taps(weight), valid_places(window, da.device),
        None if geometry.stride == (1, 1) else _first_taps(window, da.device),
        _operands.act(a) if summed else _operands.NO_ACT, mean if summed else None, da, partial, window, count, each,
        outputs, channels, outer, inner, *_tap_steps(window), EVEN_K=outer % tile.depth == 0,
        EVEN_C=inner % tile.channels == 0, PRECISION=_operands.precision(da), BLOCK_M=tile.rows,
        BLOCK_N=tile.channels, BLOCK_K=tile.depth, **tile.options,
    )
    return Summed(da, fewer_shares(partial)) if summed else da


def conv_window_wgrad(grad: Grad, a: Act, weight: Tensor, geometry: Geometry) -> Tensor:
    """dweight in float32."""
    (outputs, inner, *size), groups = weight.shape, geometry.groups
    left, right, outer = _operands.grad(_unmasked(grad, groups)), _operands.act(a), outputs // groups
    _operands.check_rows(a=right.x)
    window = _operands.window_args(right.x, *left.dout.shape[2:], (tuple(size), *geometry[:3]))
    count, taps = _operands.rows(left.dout), size[0] * size[1]
    tile = _table.tile("conv_window_wgrad", right.x.dtype, inner, arch(right.x))
    tiles = -(-outer // tile.rows) * -(-inner // tile.channels) * taps * groups
    shares, each = _table.shares(count, tile.depth, tiles, tile.shares)
    products = torch.empty((shares, outputs, taps, inner), dtype=torch.float32, device=right.x.device)
    launch(
        _conv_window_wgrad, shares * tiles, right.x, left, right, products, window, count, outputs, inner * groups,
        outer, inner, -(-count // tile.depth), each, RELU=_operands.relu(a), EVEN_K=outer % tile.rows == 0,
        EVEN_C=inner % tile.channels == 0, PRECISION=_operands.precision(right.x), BLOCK_M=tile.depth,
        BLOCK_K=tile.rows, BLOCK_C=tile.channels, **tile.options,
    )
    result, _ = merge_products(products.view(shares, outputs, taps * inner), None, None)
    return result.view(outputs, *size, inner).permute(0, 3, 1, 2)


def _unmasked(grad: Grad, groups: int) -> Grad:
    """The gradient without a mask where there are groups, whose channels do not begin at its words."""
    if groups == 1:
        return grad
    if isinstance(grad, BNGrad) and isinstance(grad.dy, Masked):
        return grad._replace(dy=written(grad.dy))
    return written(grad) if isinstance(grad, Masked) else grad


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
    """[taps, H*W] float32: 1 where an output pixel reads an input pixel by the tap."""
    return _valid(
        w.rows, w.columns, w.height, w.width, w.out_height, w.out_width, device,
        lambda r, h: _exact(h + w.top - r * w.apart, w.down), lambda s, v: _exact(v + w.left - s * w.across, w.right),
    )


def _exact(distance: Tensor, stride: int) -> Tensor:
    """distance / stride, and -1 where that is no integer."""
    return torch.where(distance % stride == 0, distance // stride, -1)


@lru_cache(64)
def _first_taps(w: _operands.WindowArgs, device: torch.device) -> Tensor:
    """[down + right] int32: the first tap, by lines and by columns, that reads pixels of each phase; as many as there
    are where none does."""

    def first(phase: int, taps: int, apart: int, pad: int, stride: int) -> int:
        return next((r for r in range(taps) if (phase + pad - r * apart) % stride == 0), taps)

    lines = [first(phase, w.rows, w.apart, w.top, w.down) for phase in range(w.down)]
    places = [first(phase, w.columns, w.across, w.left, w.right) for phase in range(w.right)]
    return torch.tensor(lines + places, dtype=torch.int32, device=device)


def _tap_steps(w: _operands.WindowArgs) -> tuple[int, int]:
    """From a phase's tap to its next, by lines and by columns."""
    return w.down // gcd(w.down, w.apart), w.right // gcd(w.right, w.across)


def _valid(rows, columns, height, width, limit_height, limit_width, device, line, place) -> Tensor:
    r, s, h, v = (
        torch.arange(size, device=device).view([-1 if i == j else 1 for j in range(4)])
        for i, size in enumerate((rows, columns, height, width))
    )
    down, across = line(r, h), place(s, v)
    there = (down >= 0) & (down < limit_height) & (across >= 0) & (across < limit_width)
    return there.float().flatten().contiguous()
