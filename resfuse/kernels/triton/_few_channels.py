"""A convolution of an image's few channels (a network's first) and its weight's gradient, as products.

A pixel's C <= 4 channels are stored as four values, in a copy of the image whose padding is there: the pixels that a
line of the window reads then lie one after the other, `run` values for each line, and with a stride begin at whole
accesses.

    z[m] = sum over lines of x[m's line, run] @ W[line, run].T,        dweight = g.T @ x[lines, run]

Reads the copy, a quarter of z in a ResNet's first convolution, once for each line of the window (by the L2 cache), and
g's recipe once; writes z. Whatever of a run no channel or tap stands for meets a zero of W, or is not kept of dweight:
where that is a pixel, of a window whose lines are no power of two long, and it is NaN or infinite, z is NaN there.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import Geometry, Grad, Stats
from ..nvidia import check_stored
from . import _launch, _operands, _table
from ._launch import arch, launch
from ._moments import merge_moments, store_output
from ._outer_product import merge_products
from ._tiles import as_read, load_grad

PIXEL = 4  # values of a stored pixel
LONGEST = 8  # pixels of a window's line
MOST = 256  # values of a window, which a program of the weight's gradient has at once


@triton.jit(do_not_specialize=["pixels"])
def _padded(
    x,  # [N, C, H, W] storage, any strides
    out,  # [N, lines, width, PIXEL] storage
    pixels, lines, width, height_in, width_in, C, top, left, by_sample, by_channel, by_line, by_pixel,
    PIXEL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    index, channel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, PIXEL)
    line, place = index // width % lines - top, index % width - left
    held = (index < pixels) & (line >= 0) & (line < height_in) & (place >= 0) & (place < width_in)
    start = (index // (width * lines)).to(tl.int64) * by_sample + line * by_line + place * by_pixel
    at = x + start[:, None] + channel[None, :] * by_channel
    t = tl.load(at, mask=held[:, None] & (channel < C)[None, :], other=0.0)
    tl.store(out + index.to(tl.int64)[:, None] * PIXEL + channel[None, :], t, mask=(index < pixels)[:, None])


@triton.jit
def _run_starts(index, pixels, out_width, sample, line, RIGHT: tl.constexpr, PIXEL: tl.constexpr):
    """Where the first run of each output pixel begins."""
    pixel = index % pixels
    across = pixel % out_width * (RIGHT * PIXEL)
    return (index // pixels).to(tl.int64) * sample + pixel // out_width * line + across


@triton.jit(do_not_specialize=["M"])
def _conv_few(
    x,  # [N, lines, width, PIXEL] storage
    weight,  # [K, LINES, RUN] storage
    z,  # [M, K] storage
    partial,  # [blocks of rows, 2, K] float32, or None
    M, K, pixels, out_width, sample, line, row,  # values of a sample, from an output line to the next, of a line
    LINES: tl.constexpr, RUN: tl.constexpr, RIGHT: tl.constexpr, PIXEL: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(K, BLOCK_N)
    block = tl.program_id(0) // columns
    index = block * BLOCK_M + tl.arange(0, BLOCK_M)
    cols, inside = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N), index < M
    start = _run_starts(index, pixels, out_width, sample, line, RIGHT, PIXEL)
    run, acc = tl.arange(0, RUN), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in range(0, LINES):
        t = tl.load(x + start[:, None] + (r * row + run)[None, :], mask=inside[:, None], other=0.0)
        at = weight + cols[:, None] * (LINES * RUN) + (r * RUN + run)[None, :]
        if EVEN_K:
            w = tl.load(at)
        else:
            w = tl.load(at, mask=(cols < K)[:, None], other=0.0)
        acc = tl.dot(as_read(t, PRECISION), as_read(w, PRECISION).T, acc, input_precision=PRECISION)
    store_output(z, partial, acc + 0.0, block, index, cols, inside, M, K, K, EVEN_K, BLOCK_M)


@triton.jit(do_not_specialize=["steps", "each"])
def _few_wgrad(
    g,  # GradArgs [M, K]
    x,  # [N, lines, width, PIXEL] storage
    products,  # [shares, K, LINES * RUN] float32
    K, out_height, out_width, sample, line, row, steps, each,
    LINES: tl.constexpr, RUN: tl.constexpr, RIGHT: tl.constexpr, PIXEL: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles, parts = tl.cdiv(K, BLOCK_K), tl.cdiv(out_width, BLOCK_M)
    share, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_K
    value = tl.arange(0, BLOCK_C)
    offset, own = value // RUN * row + value % RUN, value < LINES * RUN
    acc = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for step in range(share * each, tl.minimum(share * each + each, steps)):
        # A part of a line of output pixels: no pixel of its own has to be found by divisions.
        above, place = step // parts, step % parts * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = place < out_width
        t = load_grad(g, above * out_width + place, first, inside, K, EVEN_K, BLOCK_M, BLOCK_K)
        t = as_read(tl.where(inside[:, None], t, 0.0).to(t.dtype), PRECISION)
        start = x + ((above // out_height).to(tl.int64) * sample + above % out_height * line)
        at = start + (place * (RIGHT * PIXEL))[:, None] + offset[None, :]
        taps = tl.load(at, mask=inside[:, None] & own[None, :], other=0.0)
        acc = tl.dot(t.T, as_read(taps, PRECISION), acc, input_precision=PRECISION)
    outputs = first + tl.arange(0, BLOCK_K)
    to = products + share.to(tl.int64) * K * (LINES * RUN) + outputs[:, None] * (LINES * RUN) + value[None, :]
    tl.store(to, acc, mask=(outputs < K)[:, None] & own[None, :])


def fits(x: object, weight: Tensor, geometry: Geometry) -> bool:
    """Whether these kernels can take a convolution: of a tensor, of at most PIXEL channels without groups or dilation,
    by lines of at most LONGEST pixels, MOST values in all; of fewer pixels than 32 bits count."""
    if not isinstance(x, Tensor) or x.dim() != 4 or geometry.groups != 1 or geometry.dilation != (1, 1):
        return False
    (n, _, *sides), spare = x.shape, 2 * LONGEST
    pixels = n * math.prod(side + 2 * pad + spare for side, pad in zip(sides, geometry.padding, strict=True))
    _, channels, lines, across = weight.shape
    return channels <= PIXEL and across <= LONGEST and lines * _run(weight) <= MOST and pixels < 1 << 31


def conv_few(x: Tensor, weight: Tensor, geometry: Geometry, stats: bool) -> tuple[Tensor, Stats | None]:
    """z of a convolution that fits, and its moments."""
    image, sizes, spatial = _image(x, weight, geometry)
    outputs, lines, run = weight.shape[0], weight.shape[2], _run(weight)
    z = torch.empty(
        (x.shape[0], outputs, *spatial), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    count, tile = _operands.rows(z), _table.tile("conv_few", z.dtype, outputs, arch(z))
    blocks, columns = -(-count // tile.rows), -(-outputs // tile.channels)
    partial = torch.empty((blocks, 2, outputs), dtype=torch.float32, device=z.device) if stats else None
    launch(
        _conv_few, blocks * columns, z, image, _by_runs(weight), z, partial, count, outputs, *sizes, LINES=lines,
        RUN=run, RIGHT=geometry.stride[1], PIXEL=PIXEL, EVEN_K=outputs % tile.channels == 0,
        PRECISION=_operands.precision(z), BLOCK_M=tile.rows, BLOCK_N=tile.channels, **tile.options,
    )
    return z, merge_moments(partial, tile.rows, count) if stats else None


def few_wgrad(grad: Grad, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """dweight of a convolution that fits, in float32."""
    g, (outputs, channels, lines, across), run = _operands.grad(grad), weight.shape, _run(weight)
    image, sizes, _ = _image(x, weight, geometry)
    width, (n, _, out_height, out_width) = triton.next_power_of_2(lines * run), g.dout.shape
    tile = _table.tile("few_wgrad", x.dtype, width, arch(x))
    tiles, steps = -(-outputs // tile.rows), n * out_height * -(-out_width // tile.depth)
    shares, each = _table.shares(steps, 1, tiles, tile.shares)
    products = torch.empty((shares, outputs, lines * run), dtype=torch.float32, device=x.device)
    launch(
        _few_wgrad, shares * tiles, x, g, image, products, outputs, out_height, *sizes[1:], steps, each, LINES=lines,
        RUN=run, RIGHT=geometry.stride[1], PIXEL=PIXEL, EVEN_K=outputs % tile.rows == 0,
        PRECISION=_operands.precision(x), BLOCK_M=tile.depth, BLOCK_K=tile.rows, BLOCK_C=width, **tile.options,
    )
    result = merge_products(products, None, None)[0].view(outputs, lines, run // PIXEL, PIXEL)
    kept = result[:, :, :across, :channels].permute(0, 3, 1, 2)
    return torch.empty_like(weight, dtype=torch.float32).copy_(kept)


def _image(x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, tuple[int, ...], tuple[int, int]]:
    """The padded copy, its sizes as the kernels take them, and the sizes of the convolution's result."""
    check_stored(_launch.instead, a=x)
    (n, channels, height, width), (top, left), (down, right) = x.shape, geometry.padding, geometry.stride
    out_height, out_width = geometry.spatial((height, width), weight.shape[2:])
    lines = (out_height - 1) * down + weight.shape[2]
    # A line of whole accesses, whose last run ends inside it.
    across = -(-((out_width - 1) * right + _run(weight) // PIXEL) // 4) * 4
    image, pixels, block = x.new_empty((n, lines, across, PIXEL)), n * lines * across, 512
    launch(
        _padded, -(-pixels // block), x, x, image, pixels, lines, across, height, width, channels, top, left,
        *(x.stride(i) for i in range(4)), PIXEL=PIXEL, BLOCK_M=block, num_warps=4,
    )
    row = across * PIXEL
    return image, (out_height * out_width, out_width, lines * row, down * row, row), (out_height, out_width)


def _run(weight: Tensor) -> int:
    """Values of a window's line, as the products take them."""
    return max(16, triton.next_power_of_2(weight.shape[3] * PIXEL))


def _by_runs(weight: Tensor) -> Tensor:
    """[K, lines, run] of a weight [K, C, lines, across]."""
    outputs, channels, lines, across = weight.shape
    arranged = weight.new_zeros((outputs, lines, _run(weight) // PIXEL, PIXEL))
    arranged[:, :, :across, :channels] = weight.permute(0, 2, 3, 1)
    return arranged.view(outputs, lines, -1)
