"""bn_relu_max_pool_backward: dout to where the maxima were, then BatchNorm's backward under its ReLU.

Each input pixel gathers from the windows that may hold it, `lines` x `columns` of them, in a fixed order. Reads dout
and argmax as often as windows overlap, mostly from a cache; writes dy. BatchNorm's sums are a pass of their own: here
they took more time than they spared (0.97 ms at ResNet-50's stem on an H100, against 0.46 + 0.32).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import BNContext, Grad, Norm, Window
from . import _operands, _table
from ._launch import arch, launch
from .bn_backward import bn_backward


@triton.jit(do_not_specialize=["M"])
def _max_pool_backward(
    dout, argmax,  # [N*P*Q, C] storage, uint8
    dy,  # [N*H*W, C] storage
    w,  # WindowArgs
    M, C,
    LINES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(C, BLOCK_C)
    cols = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    index = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    held = (index < M)[:, None] & (cols < C)[None, :]
    pixel = index % (w.height * w.width)
    line, column = pixel // w.width + w.top, pixel % w.width + w.left
    sample = (index // (w.height * w.width)).to(tl.int64) * w.out_height * w.out_width
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for i in tl.range(0, LINES * COLUMNS, loop_unroll_factor=4):  # loads of several windows in flight
        p, q = line // w.down - i // COLUMNS, column // w.right - i % COLUMNS
        h, v = line - p * w.down, column - q * w.right
        there = (p >= 0) & (p < w.out_height) & (q >= 0) & (q < w.out_width)
        there = there & (h % w.apart == 0) & (h < w.rows * w.apart) & (v % w.across == 0) & (v < w.columns * w.across)
        tap = h // w.apart * w.columns + v // w.across
        at = (sample + p * w.out_width + q)[:, None] * C + cols[None, :]
        mine = held & there[:, None]
        place = tl.load(argmax + at, mask=mine, other=255).to(tl.int32)
        t = tl.load(dout + at, mask=mine, other=0.0).to(tl.float32)
        total += tl.where(place == tap[:, None], t, 0.0)
    tl.store(dy + index.to(tl.int64)[:, None] * C + cols[None, :], total.to(dy.dtype.element_ty), mask=held)


def bn_relu_max_pool_backward(
    dout: Tensor, argmax: Tensor, a: Norm, window: Window, context: BNContext
) -> tuple[Grad, Tensor, Tensor]:
    z, channels = a.z, a.z.shape[1]
    _operands.check_rows(dout=dout, z=z)
    dy, count = torch.empty_like(z), _operands.rows(z)
    tile = _table.tile("max_pool", z.dtype, channels, arch(z))
    lines, columns = (
        -(-((size - 1) * apart + 1) // step)
        for size, step, apart in zip(window.size, window.stride, window.dilation, strict=True)
    )
    launch(
        _max_pool_backward, -(-count // tile.rows) * -(-channels // tile.channels), z, dout, argmax, dy,
        _operands.window_args(z, *dout.shape[2:], window[:4]), count, channels, LINES=lines, COLUMNS=columns,
        BLOCK_M=tile.rows, BLOCK_C=tile.channels, **tile.options,
    )
    return bn_backward(dy, a._replace(relu=True), z, context)
