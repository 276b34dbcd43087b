"""Products by rows of few inner channels, all of which one step multiplies: a program keeps its columns of W and goes
through blocks of rows, whose operands were asked for some blocks before.

    out = act(scale * (a @ W.T) + shift + residual),        da = g @ W + add

Such a product waits for memory alone. A program that ends with its block asks for nothing while it multiplies, rounds
and stores. Reads a (g), and the residual (add) once for each column of tiles, W once for each program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _operands
from ._launch import launch
from ._moments import store_moments, tile_moments
from ._sum import load_residual, write_sum
from ._table import Tile
from ._tiles import as_read, load_act, load_grad, load_vector, load_weight, row_starts


@triton.jit(do_not_specialize=["M", "apart"])
def _expand_narrow(
    a,  # ActArgs [M, C]
    weight,  # [K, C] storage
    scale, shift,  # [K] float32
    s,  # SumArgs [M, K], with a residual
    out,  # [M, K] storage
    mask,  # [M, ceil(K / its bits)], or None
    partial,  # [blocks of rows, 2, K] float32: moments of out, or None
    M, C, K, apart,
    RELU: tl.constexpr, A_RELU: tl.constexpr, RESIDUAL_RELU: tl.constexpr, EVEN_C: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(K, BLOCK_N)
    start, first = tl.program_id(0) // columns, tl.program_id(0) % columns * BLOCK_N
    cols, depth = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    w = as_read(load_weight(weight, cols, depth, K, C, EVEN_K, EVEN_C), PRECISION).T
    for step in tl.range(0, tl.cdiv(tl.cdiv(M, BLOCK_M) - start, apart), num_stages=STAGES):
        block = start + step * apart
        index = block * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = index < M
        residual = load_residual(s, index, cols, inside, K, EVEN_K)
        t = load_act(a, row_starts(a.view, index, C), depth, inside, C, A_RELU, EVEN_C)
        y = tl.dot(as_read(t, PRECISION), w, input_precision=PRECISION)
        y = tl.fma(y, load_vector(scale, cols, K, EVEN_K), load_vector(shift, cols, K, EVEN_K))
        stored = write_sum(
            y, residual.to(tl.float32), s, out, mask, index, first, inside, K, RELU, RESIDUAL_RELU, EVEN_K, BLOCK_M,
            BLOCK_N,
        )
        if partial is not None:
            count = tl.minimum(M - block * BLOCK_M, BLOCK_M).to(tl.float32)
            mean, squares = tile_moments(stored.to(tl.float32), inside, count)
            store_moments(partial, block, cols, K, K, mean, squares)


@triton.jit(do_not_specialize=["M", "apart"])
def _dgrad_narrow(
    g,  # GradArgs [M, K]
    weight,  # [K, C] storage
    add,  # GradArgs [M, C]
    da,  # [M, C] storage
    M, K, C, apart,
    EVEN_K: tl.constexpr, EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(C, BLOCK_N)
    start, first = tl.program_id(0) // columns, tl.program_id(0) % columns * BLOCK_N
    cols, depth = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    w = as_read(load_weight(weight, depth, cols, K, C, EVEN_K, EVEN_C), PRECISION)
    for step in tl.range(0, tl.cdiv(tl.cdiv(M, BLOCK_M) - start, apart), num_stages=STAGES):
        block = start + step * apart
        index = block * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = index < M
        beside = load_grad(add, index, first, inside, C, EVEN_C, BLOCK_M, BLOCK_N)
        t = load_grad(g, index, 0, inside, K, EVEN_K, BLOCK_M, BLOCK_K)
        acc = tl.dot(as_read(t, PRECISION), w, input_precision=PRECISION) + beside.to(tl.float32)
        held = inside[:, None] if EVEN_C else inside[:, None] & (cols < C)[None, :]
        tl.store(da + index.to(tl.int64)[:, None] * C + cols[None, :], acc.to(da.dtype.element_ty), mask=held)


def expand_narrow(
    args: _operands.ActArgs, weight: Tensor, scale: Tensor, shift: Tensor, s: _operands.SumArgs, out: Tensor,
    mask: Tensor | None, stats: bool, tile: Tile, **flags: bool,
) -> Tensor | None:
    """Writes out and mask; the partial moments of out where they are asked for."""
    (outputs, channels), count = weight.shape, _operands.rows(out)
    blocks = -(-count // tile.rows)
    partial = torch.empty((blocks, 2, outputs), dtype=torch.float32, device=out.device) if stats else None
    apart, programs = _programs(blocks, outputs, tile)
    launch(
        _expand_narrow, programs, out, args, weight, scale, shift, s, out, _operands.words(mask, outputs), partial,
        count, channels, outputs, apart, **flags, **_sizes(channels, outputs, out, tile),
    )
    return partial


def dgrad_narrow(
    g: _operands.GradArgs, weight: Tensor, add: _operands.GradArgs, da: Tensor, tile: Tile
) -> None:
    """Writes da."""
    (outer, channels), count = weight.shape, _operands.rows(da)
    apart, programs = _programs(-(-count // tile.rows), channels, tile)
    launch(
        _dgrad_narrow, programs, da, g, weight, add, da, count, outer, channels, apart,
        **_sizes(outer, channels, da, tile, "KC"),
    )


def _programs(blocks: int, written: int, tile: Tile) -> tuple[int, int]:
    """(blocks of rows between two of a program, programs): each column of tiles has as many."""
    columns = -(-written // tile.channels)
    apart = max(1, min(blocks, tile.shares // columns))
    return apart, apart * columns


def _sizes(inner: int, written: int, like: Tensor, tile: Tile, names: str = "CK") -> dict[str, object]:
    depth = max(16, triton.next_power_of_2(inner))
    return {
        f"EVEN_{names[0]}": inner == depth, f"EVEN_{names[1]}": written % tile.channels == 0,
        "PRECISION": _operands.precision(like), "BLOCK_M": tile.rows, "BLOCK_N": tile.channels, "BLOCK_K": depth,
        "STAGES": tile.stages, **tile.options,
    }  # fmt: skip
