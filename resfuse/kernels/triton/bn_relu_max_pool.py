"""bn_relu_max_pool: maxima of relu(scale * z + shift) over windows, and where they are.

Reads z as often as windows overlap, mostly from a cache; writes the maxima and a byte for each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import Norm, Window
from . import _operands, _table
from ._launch import arch, launch
from ._tiles import activate, load_vector


@triton.jit(do_not_specialize=["M"])
def _bn_relu_max_pool(
    z,  # [N*H*W, C] storage
    scale, shift,  # [C] float32
    out,  # [N*P*Q, C] storage
    argmax,  # [N*P*Q, C] uint8
    w,  # WindowArgs
    M, C,
    EVEN_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(C, BLOCK_C)
    cols = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    index = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    held = (index < M)[:, None] & (cols < C)[None, :]
    pixel = index % (w.out_height * w.out_width)
    line, column = pixel // w.out_width * w.down - w.top, pixel % w.out_width * w.right - w.left
    sample = (index // (w.out_height * w.out_width)).to(tl.int64) * w.height * w.width
    scales, shifts = load_vector(scale, cols, C, EVEN_C), load_vector(shift, cols, C, EVEN_C)
    best = tl.full((BLOCK_M, BLOCK_C), float("-inf"), tl.float32)
    place = tl.zeros((BLOCK_M, BLOCK_C), tl.int32)
    for tap in range(0, w.rows * w.columns):
        h, v = line + tap // w.columns * w.apart, column + tap % w.columns * w.across
        there = (h >= 0) & (h < w.height) & (v >= 0) & (v < w.width)
        at = z + (sample + h * w.width + v)[:, None] * C + cols[None, :]
        value = activate(tl.load(at, mask=held & there[:, None], other=0.0), scales, shifts, True).to(tl.float32)
        larger = there[:, None] & ((value > best) | (value != value))
        best = tl.where(larger, value, best)
        place = tl.where(larger, tap, place)
    at = index.to(tl.int64)[:, None] * C + cols[None, :]
    tl.store(out + at, best.to(out.dtype.element_ty), mask=held)
    tl.store(argmax + at, place.to(tl.uint8), mask=held)


def bn_relu_max_pool(a: Norm, window: Window) -> tuple[Tensor, Tensor]:
    z, channels = a.z, a.z.shape[1]
    _operands.check_rows(z=z)
    # torch's own rule for sizes, ceil_mode included.
    (n, _, height, width) = torch.nn.functional.max_pool2d(z.new_empty(z.shape, device="meta"), *window).shape
    out = torch.empty(
        (n, channels, height, width), dtype=z.dtype, device=z.device, memory_format=torch.channels_last
    )
    argmax = torch.empty_like(out, dtype=torch.uint8)
    count, tile = _operands.rows(out), _table.tile("max_pool", z.dtype, channels, arch(z))
    launch(
        _bn_relu_max_pool, -(-count // tile.rows) * -(-channels // tile.channels), z, z, a.scale, a.shift, out, argmax,
        _operands.window_args(z, height, width, window[:4]), count, channels, EVEN_C=channels % tile.channels == 0,
        BLOCK_M=tile.rows, BLOCK_C=tile.channels, **tile.options,
    )
    return out, argmax
