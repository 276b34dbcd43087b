"""select: scale * row_scale[n] * (dout where mask else 0). Reads dout and the mask, writes g."""

from collections.abc import Callable
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..interface import Grad, Masked
from . import _operands, _table
from ._launch import arch, launch
from ._tiles import load_grad


@triton.jit(do_not_specialize=["M"])
def _written(
    g,  # GradArgs [M, K]
    out,  # [M, K] storage
    M, K,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(K, BLOCK_N)
    first = tl.program_id(0) % columns * BLOCK_N
    index = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    cols, inside = first + tl.arange(0, BLOCK_N), index < M
    held = inside[:, None] if EVEN_K else inside[:, None] & (cols < K)[None, :]
    t = load_grad(g, index, first, inside, K, EVEN_K, BLOCK_M, BLOCK_N)
    tl.store(out + index.to(tl.int64)[:, None] * K + cols[None, :], t, mask=held)


def written(g: Grad) -> Tensor:
    """Any gradient recipe as a tensor, rounded once."""
    args = _operands.grad(g)
    return values(_written, args, args.dout)


def values(kernel: Callable, args: NamedTuple, like: Tensor) -> Tensor:
    """What a kernel writes of a recipe's values one by one, as many as like's."""
    channels, count = like.shape[1], _operands.rows(like)
    out = _operands.empty_rows(like, channels)
    tile = _table.tile("elements", out.dtype, channels, arch(out))
    launch(
        kernel, -(-count // tile.rows) * -(-channels // tile.channels), out, args, out, count, channels,
        EVEN_K=channels % tile.channels == 0, BLOCK_M=tile.rows, BLOCK_N=tile.channels, **tile.options,
    )
    return out


def select(grad: Masked) -> Tensor:
    return written(grad)
