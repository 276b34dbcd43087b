"""bn_relu_max_pool_backward: dout to where the maxima were, then BatchNorm's backward under its ReLU.

Each input pixel gathers from the windows that hold it, in a fixed order. Reads dout and argmax as often as windows
overlap, mostly from a cache; writes dy.
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
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(C, BLOCK_C)
    cols = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    index = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    held = (index < M)[:, None] & (cols < C)[None, :]
    pixel = index % (w.height * w.width)
    line, column = pixel // w.width + w.top, pixel % w.width + w.left
    sample = (index // (w.height * w.width)).to(tl.int64) * w.out_height * w.out_width
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for tap in range(0, w.rows * w.columns):
        h, v = line - tap // w.columns * w.apart, column - tap % w.columns * w.across
        there = (h >= 0) & (v >= 0) & (h % w.down == 0) & (v % w.right == 0)
        p, q = h // w.down, v // w.right
        there = there & (p < w.out_height) & (q < w.out_width)
        at = (sample + p * w.out_width + q)[:, None] * C + cols[None, :]
        mine = held & there[:, None]
        mine = mine & (tl.load(argmax + at, mask=mine, other=255).to(tl.int32) == tap)
        total += tl.load(dout + at, mask=mine, other=0.0).to(tl.float32)
    tl.store(dy + index.to(tl.int64)[:, None] * C + cols[None, :], total.to(dy.dtype.element_ty), mask=held)


def bn_relu_max_pool_backward(
    dout: Tensor, argmax: Tensor, a: Norm, window: Window, context: BNContext
) -> tuple[Grad, Tensor, Tensor]:
    z, channels = a.z, a.z.shape[1]
    _operands.check_rows(dout=dout, z=z)
    dy, count = torch.empty_like(z), _operands.rows(z)
    tile = _table.tile("max_pool", z.dtype, channels, arch(z))
    launch(
        _max_pool_backward, -(-count // tile.rows) * -(-channels // tile.channels), z, dout, argmax, dy,
        _operands.window_args(z, *dout.shape[2:], window[:4]), count, channels, BLOCK_M=tile.rows,
        BLOCK_C=tile.channels, **tile.options,
    )
    return bn_backward(dy, a._replace(relu=True), z, context)
