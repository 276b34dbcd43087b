"""apply: a sum whose main branch is scale * z + shift, and its mask. Reads z and the residual once, writes out."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import Act, Norm, Second, Sum, Want, Written
from . import _operands, _table
from ._launch import arch, launch
from ._sum import load_residual, write_sum
from ._tiles import load_tile, load_vector, row_starts
from .expand import write


@triton.jit(do_not_specialize=["M"])
def _apply(
    a,  # ActArgs [M, K]
    s,  # SumArgs [M, K]
    out,  # [M, K] storage
    mask,  # [M, ceil(K / its bits)], or None
    M, K,
    RELU: tl.constexpr, RESIDUAL_RELU: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(K, BLOCK_N)
    first = tl.program_id(0) % columns * BLOCK_N
    index = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    cols, inside = first + tl.arange(0, BLOCK_N), index < M
    residual = None
    if s.residual is not None:
        residual = load_residual(s, index, cols, inside, K, EVEN_K).to(tl.float32)
    z = load_tile(a.x, row_starts(a.view, index, K), cols, inside, K, EVEN_K).to(tl.float32)
    y = tl.fma(z, load_vector(a.scale, cols, K, EVEN_K), load_vector(a.shift, cols, K, EVEN_K))
    write_sum(y, residual, s, out, mask, index, first, inside, K, RELU, RESIDUAL_RELU, EVEN_K, BLOCK_M, BLOCK_N)


def apply(a: Norm, total: Sum, want: Want) -> Written:
    if isinstance(total.residual, Second):
        return write(a.z, None, a.scale, a.shift, total, want)
    args, count, channels = _operands.act(a._replace(y=None)), _operands.rows(a.z), a.z.shape[1]
    out = _operands.empty_rows(a.z, channels)
    mask = out.new_empty((count, -(-channels // 8)), dtype=torch.uint8) if want.mask else None
    tile = _table.tile("elements", out.dtype, channels, arch(out))
    launch(
        _apply, -(-count // tile.rows) * -(-channels // tile.channels), out, args,
        _operands.total(total, out, channels), out, _operands.words(mask, channels), count, channels, RELU=total.relu,
        RESIDUAL_RELU=isinstance(total.residual, Norm) and total.residual.relu, EVEN_K=channels % tile.channels == 0,
        BLOCK_M=tile.rows, BLOCK_N=tile.channels, **tile.options,
    )
    return Written(out, mask)


def materialised(a: Act) -> Tensor:
    """The activation as a tensor."""
    if not isinstance(a, Norm):
        return a
    return apply(a, Sum(relu=a.relu), Want()).out if a.y is None else a.y
