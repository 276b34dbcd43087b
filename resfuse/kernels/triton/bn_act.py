"""bn_act: act(scale * z + shift) in float32, rounded once. Reads z, writes y."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import Norm
from . import _operands, _table
from ._activations import act_value
from ._launch import arch, launch
from ._table import Tile
from ._tiles import load_tile, load_vector


@triton.jit(do_not_specialize=["M"])
def _bn_act(
    z,  # [M, C] storage
    scale, shift,  # [C] float32
    y,  # [M, C] storage
    slope,  # of the activation
    M, groups,
    KIND: tl.constexpr, GROUP: tl.constexpr, EVEN_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = groups * GROUP
    columns = tl.cdiv(C, BLOCK_C)
    cols = tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    index = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    inside, starts = index < M, index.to(tl.int64) * C
    held = inside[:, None] if EVEN_C else inside[:, None] & (cols < C)[None, :]
    value = load_tile(z, starts, cols, inside, C, EVEN_C).to(tl.float32)
    v = tl.fma(value, load_vector(scale, cols, C, EVEN_C), load_vector(shift, cols, C, EVEN_C))
    tl.store(y + starts[:, None] + cols[None, :], act_value(v, slope, KIND).to(y.dtype.element_ty), mask=held)


def choices(a: Norm) -> tuple[Tile, int, dict]:
    """For the kernels of an activation: tile, groups of channels, what they are compiled for.

    Networks with these activations have 24, 40, 72 or 120 channels. Rows of whole groups of 8 are read a group at once,
    where Triton by itself does that for multiples of 16; others take an address for each value, so the tile of few.
    """
    z, channels = a.z, a.z.shape[1]
    group = 1 if channels % 8 else 8
    tile = _table.tile("elements", z.dtype, channels if group > 1 else 1, arch(z))
    return tile, channels // group, {
        "KIND": a.act.kind, "GROUP": group, "EVEN_C": channels % tile.channels == 0, "BLOCK_M": tile.rows,
        "BLOCK_C": tile.channels, **tile.options,
    }  # fmt: skip


def bn_act(a: Norm) -> Tensor:
    z = a.z
    _operands.check_rows(z=z)
    y, count = torch.empty_like(z), _operands.rows(z)
    tile, groups, options = choices(a)
    launch(
        _bn_act, -(-count // tile.rows) * -(-z.shape[1] // tile.channels), z, z, _operands.vector(a.scale),
        _operands.vector(a.shift), y, a.act.slope, count, groups, **options,
    )
    return y
