"""expand_dgrad: da = g @ Wg - q_scale * (a @ q) - c, rounded once, masked by a's ReLU where asked.

Reads g (or u) and a once for each column of tiles, and a's own column again for the mask; writes da. The product of a
comes first: q_scale, a power of two, then scales it exactly, and that of g is added to the same sums.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..interface import Act, Grad
from . import _operands, _table
from ._launch import arch, launch
from ._tiles import add_grad_product, as_read, load_act, load_tile, load_vector, load_weight, row_starts


@triton.jit(do_not_specialize=["M"])
def _expand_dgrad(
    g,  # GradArgs [M, K], or nothing where u is given
    u,  # [M, C] float32 or storage, or None
    a,  # ActArgs [M, C]
    wg,  # [K, C] storage
    q, q_scale, c,  # [C, C] storage, one float32, [C] float32; or None
    da,  # [M, C] storage
    M, K, C,
    A_RELU: tl.constexpr, RELU: tl.constexpr, EVEN_K: tl.constexpr, EVEN_C: tl.constexpr, EVEN_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(C, BLOCK_N)
    index = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    cols, inside = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N), index < M
    starts = row_starts(a.view, index, C)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if q is not None:
        tl.assume(C > 0)
        for k in range(0, C, BLOCK_K):
            depth = k + tl.arange(0, BLOCK_K)
            t = load_act(a, starts, depth, inside, C, A_RELU, EVEN_DEPTH)
            w = load_weight(q, depth, cols, C, C, EVEN_DEPTH, EVEN_C)
            acc = tl.dot(as_read(t, PRECISION), as_read(w, PRECISION), acc, input_precision=PRECISION)
        acc *= -tl.load(q_scale)
    if u is not None:
        acc += load_tile(u, index.to(tl.int64) * C, cols, inside, C, EVEN_C).to(tl.float32)
    else:
        acc = add_grad_product(
            acc, g, wg, index, inside, cols, K, C, EVEN_K, EVEN_C, PRECISION, BLOCK_M, BLOCK_K
        )
    if c is not None:
        acc -= load_vector(c, cols, C, EVEN_C)
    if RELU:
        acc = tl.where(load_act(a, starts, cols, inside, C, A_RELU, EVEN_C) <= 0, 0.0, acc)
    held = inside[:, None] if EVEN_C else inside[:, None] & (cols < C)[None, :]
    tl.store(da + index.to(tl.int64)[:, None] * C + cols[None, :], acc.to(da.dtype.element_ty), mask=held)


def expand_dgrad(
    g: Grad, u: Tensor | None, a: Act, wg: Tensor,
    q: Tensor | None, q_scale: Tensor | None, c: Tensor | None, relu: bool,
) -> Tensor:
    args, outer = _operands.act(a), wg.shape[0]
    count, channels = _operands.rows(args.x), args.x.shape[1]
    _operands.check_rows(u=u)
    da = _operands.empty_rows(args.x, channels)
    tile = _table.tile("expand_dgrad", da.dtype, channels, arch(da))
    launch(
        _expand_dgrad, -(-count // tile.rows) * -(-channels // tile.channels), da,
        _operands.grad(g) if u is None else _operands.NO_GRAD, u, args, wg, q, q_scale, c, da, count, outer, channels,
        A_RELU=_operands.relu(a), RELU=relu, EVEN_K=outer % tile.depth == 0, EVEN_C=channels % tile.channels == 0,
        EVEN_DEPTH=channels % tile.depth == 0, PRECISION=_operands.precision(da), BLOCK_M=tile.rows,
        BLOCK_N=tile.channels, BLOCK_K=tile.depth, **tile.options,
    )
    return da
