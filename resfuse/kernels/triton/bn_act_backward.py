"""bn_act_backward: dz = scale * (d - mean_dy - (z - mean) * along), d = dy * act'(scale * z + shift) in float32.

The sums need every row before the first dz is known: one pass gives sum(d) and sum(d * (z - mean)) of shares of the
rows, `bn_vectors` adds them, another makes d again and writes dz. Each reads dy and z once; the second writes dz: five
tensors in all, where a stored d would make six. along is `BNGrad.slope`, since an activation has a slope too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import BNContext, Norm
from . import _operands, _table
from ._activations import act_gradient
from ._launch import launch
from ._tiles import load_tile, load_vector
from .bn_act import choices
from .bn_reduce import bn_vectors


@triton.jit
def _below(dy, z, scale, shift, slope, starts, cols, inside, C, KIND: tl.constexpr, EVEN_C: tl.constexpr):
    """Tiles of d, z and scale, float32; rows beyond the last have no gradient."""
    t = load_tile(dy, starts, cols, inside, C, EVEN_C).to(tl.float32)
    value = load_tile(z, starts, cols, inside, C, EVEN_C).to(tl.float32)
    times = load_vector(scale, cols, C, EVEN_C)
    v = tl.fma(value, times, load_vector(shift, cols, C, EVEN_C))
    return act_gradient(t, v, slope, KIND), value, times


@triton.jit(do_not_specialize=["M", "blocks", "each"])
def _bn_act_reduce(
    dy, z,  # [M, C] storage
    scale, shift, mean,  # [C] float32
    partial,  # [shares, 2, C] float32
    slope,  # of the activation
    M, groups, blocks, each,
    KIND: tl.constexpr, GROUP: tl.constexpr, EVEN_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = groups * GROUP
    columns = tl.cdiv(C, BLOCK_C)
    share, cols = tl.program_id(0) // columns, tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    centre = load_vector(mean, cols, C, EVEN_C)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    along = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for block in range(share * each, tl.minimum(share * each + each, blocks)):
        index = block * BLOCK_M + tl.arange(0, BLOCK_M)
        starts = index.to(tl.int64) * C
        d, value, _ = _below(dy, z, scale, shift, slope, starts, cols, index < M, C, KIND, EVEN_C)
        total += d
        along += d * (value - centre)
    at = partial + share * (2 * C) + cols
    tl.store(at, tl.sum(total, 0), mask=cols < C)
    tl.store(at + C, tl.sum(along, 0), mask=cols < C)


@triton.jit(do_not_specialize=["M"])
def _bn_act_dgrad(
    dy, z,  # [M, C] storage
    scale, shift,  # [C] float32
    mean, mean_dy, along,  # [C] float32, or None where the statistics are constants
    dz,  # [M, C] storage
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
    t, value, times = _below(dy, z, scale, shift, slope, starts, cols, inside, C, KIND, EVEN_C)
    if mean is not None:
        t = t - load_vector(mean_dy, cols, C, EVEN_C)
        t = t - (value - load_vector(mean, cols, C, EVEN_C)) * load_vector(along, cols, C, EVEN_C)
    tl.store(dz + starts[:, None] + cols[None, :], (t * times).to(dz.dtype.element_ty), mask=held)


def bn_act_backward(dy: Tensor, a: Norm, context: BNContext) -> tuple[Tensor, Tensor, Tensor]:
    z, channels = a.z, a.z.shape[1]
    _operands.check_rows(dy=dy, z=z)
    count, scale, shift, mean = _operands.rows(z), *map(_operands.vector, (a.scale, a.shift, context.mean))
    tile, groups, options = choices(a)
    blocks, columns = -(-count // tile.rows), -(-channels // tile.channels)
    shares, each = _table.shares(count, tile.rows, columns, tile.shares)
    partial = torch.empty((shares, 2, channels), dtype=torch.float32, device=z.device)
    launch(
        _bn_act_reduce, shares * columns, z, dy, z, scale, shift, mean, partial, a.act.slope, count, groups, blocks,
        each, **options,
    )
    dbeta, dgamma, mean_dy, along, _ = bn_vectors(partial, count, context)
    if not context.batch:
        mean = mean_dy = along = None
    dz = torch.empty_like(z)
    launch(
        _bn_act_dgrad, blocks * columns, z, dy, z, scale, shift, mean, mean_dy, along, dz, a.act.slope, count, groups,
        **options,
    )
    return dz, dgamma, dbeta
