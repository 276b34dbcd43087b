"""prepare: the kernels compute recipes in registers, so a recipe that they can read stays one. But products of many
channels compute it again for each column of their tiles: an activation is written out for them where that is quicker,
and so are the pixels of a strided view.
"""

import triton
import triton.language as tl

from ..interface import Act, BNGrad, Grad, Masked, Norm
from . import _operands, _table
from ._launch import arch
from ._tiles import load_tile, row_starts
from .apply import materialised
from .select import values


@triton.jit(do_not_specialize=["M"])
def _dense(
    a,  # ActArgs [M, K], of which x and view are read
    out,  # [M, K] storage
    M, K,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(K, BLOCK_N)
    index = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    cols, inside = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N), index < M
    held = inside[:, None] if EVEN_K else inside[:, None] & (cols < K)[None, :]
    t = load_tile(a.x, row_starts(a.view, index, K), cols, inside, K, EVEN_K)
    tl.store(out + index.to(tl.int64)[:, None] * K + cols[None, :], t, mask=held)


def prepare(operand: Act | Grad, outer: int = 0) -> Act | Grad:
    if isinstance(operand, Norm):
        channels = _operands.act(operand).x.shape[1]
        if operand.y is None and outer >= 2 * channels and _table.written_first(operand.z, arch(operand.z)):
            return operand._replace(y=materialised(operand))
    elif isinstance(operand, Masked | BNGrad):
        _operands.grad(operand)
    elif outer:  # an activation
        args = _operands.act(operand)
        if args.view is not None and _table.written_first(operand, arch(operand)):
            return values(_dense, args, args.x)
    return operand
