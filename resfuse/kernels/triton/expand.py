"""expand: a sum whose main branch is scale * (a @ W.T) + shift; the 1x1's raw output is never stored.

Reads a and W (a second product's too) once for each column of tiles, the residual once; writes out, a bit for each of
its values, and gives its moments from the tiles as they are stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import Act, Norm, Second, Sum, Want, Written
from . import _operands, _table
from ._launch import arch, launch
from ._moments import merge_moments, store_moments, tile_moments
from ._narrow import expand_narrow
from ._sum import load_residual, write_sum
from ._tiles import add_act_product, load_tile, load_vector, row_starts


@triton.jit(do_not_specialize=["M"])
def _expand(
    a,  # ActArgs [M, C]; without weight its values are the main branch's, [M, K]
    weight,  # [K, C] storage, or None
    scale, shift,  # [K] float32
    second,  # ActArgs [M, D], or nothing
    second_weight,  # [K, D] storage
    second_scale, second_shift,  # [K] float32
    s,  # SumArgs [M, K]
    out,  # [M, K] storage
    mask,  # [M, ceil(K / its bits)], or None
    partial,  # [blocks of rows, 2, K] float32: moments of out, or None
    M, C, D, K,
    RELU: tl.constexpr, A_RELU: tl.constexpr, SECOND_RELU: tl.constexpr, RESIDUAL_RELU: tl.constexpr,
    EVEN_C: tl.constexpr, EVEN_D: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(K, BLOCK_N)
    block, first = tl.program_id(0) // columns, tl.program_id(0) % columns * BLOCK_N
    index, cols = block * BLOCK_M + tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_N)
    inside = index < M
    residual = None
    if s.residual is not None:
        residual = load_residual(s, index, cols, inside, K, EVEN_K)
    if weight is not None:
        y = add_act_product(
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32), a, weight, row_starts(a.view, index, C), inside, cols, C, K,
            A_RELU, EVEN_C, EVEN_K, PRECISION, BLOCK_K,
        )
    else:
        y = load_tile(a.x, row_starts(a.view, index, K), cols, inside, K, EVEN_K).to(tl.float32)
    y = tl.fma(y, load_vector(scale, cols, K, EVEN_K), load_vector(shift, cols, K, EVEN_K))
    if residual is not None:
        residual = residual.to(tl.float32)
    if second.x is not None:
        residual = add_act_product(
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32), second, second_weight, row_starts(second.view, index, D), inside,
            cols, D, K, SECOND_RELU, EVEN_D, EVEN_K, PRECISION, BLOCK_K,
        )
        shifts = load_vector(second_shift, cols, K, EVEN_K)
        residual = tl.fma(residual, load_vector(second_scale, cols, K, EVEN_K), shifts)
    t = write_sum(y, residual, s, out, mask, index, first, inside, K, RELU, RESIDUAL_RELU, EVEN_K, BLOCK_M, BLOCK_N)
    if partial is not None:
        count = tl.minimum(M - block * BLOCK_M, BLOCK_M).to(tl.float32)
        mean, squares = tile_moments(t.to(tl.float32), inside, count)
        store_moments(partial, block, cols, K, K, mean, squares)


def expand(a: Act, weight: Tensor, scale: Tensor, shift: Tensor, total: Sum, want: Want) -> Written:
    return write(a, weight, scale, shift, total, want)


def write(a: Act, weight: Tensor | None, scale: Tensor, shift: Tensor, total: Sum, want: Want) -> Written:
    """The sum; without a weight its main branch is scale * a + shift."""
    args = _operands.act(a)
    channels, outputs, count = args.x.shape[1], scale.shape[0], _operands.rows(args.x)
    out = _operands.empty_rows(args.x, outputs)
    mask = out.new_empty((count, -(-outputs // 8)), dtype=torch.uint8) if want.mask else None
    summed, second = _operands.total(total, out, outputs), total.residual
    flags = {
        "RELU": total.relu, "A_RELU": _operands.relu(a),
        "RESIDUAL_RELU": isinstance(second, Norm) and second.relu,
    }  # fmt: skip
    simple = weight is not None and summed.residual is not None and total.gate is None
    if simple and _table.narrow(out, channels, arch(out)):
        tile = _table.tile("expand_narrow", out.dtype, outputs, arch(out))
        partial = expand_narrow(args, weight, scale, shift, summed, out, mask, want.stats, tile, **flags)
        return Written(out, mask, None if partial is None else merge_moments(partial, tile.rows, count))
    # A gate is one tile more in registers: as few channels at a time as a narrow block takes.
    tile = _table.tile("expand", out.dtype, outputs if total.gate is None else min(outputs, 512), arch(out))
    blocks, columns = -(-count // tile.rows), -(-outputs // tile.channels)
    partial = torch.empty((blocks, 2, outputs), dtype=torch.float32, device=out.device) if want.stats else None
    beside, held = (_operands.NO_ACT, None, None, None), 0
    if isinstance(second, Second):
        beside = _operands.act(second.x), second.weight, second.scale, second.shift
        held = second.weight.shape[1]
    launch(
        _expand, blocks * columns, out, args, weight, scale, shift, *beside,
        summed, out, _operands.words(mask, outputs), partial, count, channels, held, outputs, **flags,
        SECOND_RELU=held > 0 and _operands.relu(second.x), EVEN_C=channels % tile.depth == 0,
        EVEN_D=held % tile.depth == 0, EVEN_K=outputs % tile.channels == 0, PRECISION=_operands.precision(out),
        BLOCK_M=tile.rows, BLOCK_N=tile.channels, BLOCK_K=tile.depth, **tile.options,
    )
    return Written(out, mask, merge_moments(partial, tile.rows, count) if want.stats else None)
