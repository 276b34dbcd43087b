"""expand_dgrad: da = g @ Wg - q_scale * (a @ q) - c, rounded once, masked by a's ReLU where asked.

Reads g (or u) and a once for each column of tiles, and a's own column again for the mask and for the sums of the
BatchNorm below; writes da. The product of a comes first: q_scale, a power of two, then scales it exactly, and that of g
is added to the same sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import Act, Grad, Norm, Summed
from . import _operands, _table
from ._launch import arch, launch
from ._moments import fewer_shares, store_gradient
from ._tiles import activate, add_grad_product, as_read, load_act, load_tile, load_vector, load_weight, row_starts


@triton.jit(do_not_specialize=["M"])
def _expand_dgrad(
    g,  # GradArgs [M, K], or nothing where u is given
    u,  # [M, C] float32 or storage, or None
    a,  # ActArgs [M, C]
    y,  # [M, C] storage: a as a tensor, or None
    wg,  # [K, C] storage
    q, q_scale, c,  # [C, C] storage, one float32, [C] float32; or None
    mean,  # [C] float32, or None
    da,  # [M, C] storage
    partial,  # [blocks of rows, 2, C] float32: sum(da), sum(da * (x - mean)); or None
    M, K, C,
    A_RELU: tl.constexpr, RELU: tl.constexpr, EVEN_K: tl.constexpr, EVEN_C: tl.constexpr, EVEN_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(C, BLOCK_N)
    block = tl.program_id(0) // columns
    index = block * BLOCK_M + tl.arange(0, BLOCK_M)
    cols, inside = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N), index < M
    starts = row_starts(a.view, index, C)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if q is not None:
        tl.assume(C > 0)
        for k in range(0, C, BLOCK_K):
            depth = k + tl.arange(0, BLOCK_K)
            if y is not None:
                t = load_tile(y, index.to(tl.int64) * C, depth, inside, C, EVEN_DEPTH)
            else:
                t = load_act(a, starts, depth, inside, C, A_RELU, EVEN_DEPTH)
            w = load_weight(q, depth, cols, C, C, EVEN_DEPTH, EVEN_C)
            acc = tl.dot(as_read(t, PRECISION), as_read(w, PRECISION), acc, input_precision=PRECISION)
        acc *= -tl.load(q_scale)
    if u is not None:
        acc += load_tile(u, index.to(tl.int64) * C, cols, inside, C, EVEN_C).to(tl.float32)
    else:
        acc = add_grad_product(acc, g, wg, index, inside, cols, K, C, EVEN_K, EVEN_C, PRECISION, BLOCK_M, BLOCK_K)
    if c is not None:
        acc -= load_vector(c, cols, C, EVEN_C)
    x = acc
    if RELU or partial is not None:
        x = load_tile(a.x, starts, cols, inside, C, EVEN_C)
    if RELU:
        y = x
        if a.scale is not None:
            y = activate(x, load_vector(a.scale, cols, C, EVEN_C), load_vector(a.shift, cols, C, EVEN_C), A_RELU)
        acc = tl.where(y <= 0, 0.0, acc)
    store_gradient(da, partial, acc, x, mean, block, index, cols, inside, C, C, EVEN_C)


def expand_dgrad(
    g: Grad, u: Tensor | None, a: Act, wg: Tensor,
    q: Tensor | None, q_scale: Tensor | None, c: Tensor | None, relu: bool, mean: Tensor | None,
) -> Tensor | Summed:
    y = a.y if isinstance(a, Norm) else None
    args, outer = _operands.act(a if y is None else a._replace(y=None)), wg.shape[0]
    count, channels = _operands.rows(args.x), args.x.shape[1]
    _operands.check_rows(u=u, y=y)
    da = _operands.empty_rows(args.x, channels)
    name = "expand_dgrad" if y is None and args.scale is not None else "expand_dgrad of tensors"
    tile = _table.tile(name, da.dtype, channels, arch(da))
    blocks, columns = -(-count // tile.rows), -(-channels // tile.channels)
    summed = mean is not None and args.scale is not None
    partial = torch.empty((blocks, 2, channels), dtype=torch.float32, device=da.device) if summed else None
    launch(
        _expand_dgrad, blocks * columns, da, _operands.grad(g) if u is None else _operands.NO_GRAD, u, args, y, wg,
        q, q_scale, c, mean if summed else None, da, partial, count, outer, channels,
        A_RELU=isinstance(a, Norm) and a.relu, RELU=relu, EVEN_K=outer % tile.depth == 0,
        EVEN_C=channels % tile.channels == 0, EVEN_DEPTH=channels % tile.depth == 0,
        PRECISION=_operands.precision(da), BLOCK_M=tile.rows, BLOCK_N=tile.channels, BLOCK_K=tile.depth,
        **tile.options,
    )
    return Summed(da, fewer_shares(partial)) if summed else da
