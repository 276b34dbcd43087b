"""conv_stats: z = act(a) @ W.T and, from the tiles as they are stored, its mean and variance; other windows than 1x1 by
the vendor.

Reads a once for each column of tiles (once where K <= 128) and W, writes z.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import Act, Geometry, Norm, Stats
from ..vendor import conv
from . import _operands, _table
from ._few_channels import conv_few, fits
from ._launch import arch, launch
from ._moments import merge_moments, store_output
from ._tiles import add_act_product, row_starts
from ._window import conv_window
from .apply import materialised
from .bn_stats import bn_stats
from .prepare import prepare


@triton.jit(do_not_specialize=["M"])
def _conv_stats(
    a,  # ActArgs [M, C]
    weight,  # [K, C] storage
    z,  # [M, K] storage
    partial,  # [blocks of rows, 2, K] float32, or None
    M, C, K,
    RELU: tl.constexpr, EVEN_C: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(K, BLOCK_N)
    block = tl.program_id(0) // columns
    index = block * BLOCK_M + tl.arange(0, BLOCK_M)
    cols, inside = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N), index < M
    acc = add_act_product(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), a, weight, row_starts(a.view, index, C), inside, cols, C, K, RELU,
        EVEN_C, EVEN_K, PRECISION, BLOCK_K,
    )
    store_output(z, partial, acc, block, index, cols, inside, M, K, K, EVEN_K, BLOCK_M)


def conv_stats(a: Act, weight: Tensor, geometry: Geometry, stats: bool) -> tuple[Tensor, Stats | None]:
    if not is_product(weight, geometry):
        if fits(a, weight, geometry) and _table.few_channels(weight.dtype, arch(weight)):
            return conv_few(a, weight, geometry, stats)
        if _table.ours("conv_window", weight, geometry, arch(weight)):
            return conv_window(a, weight, geometry, stats)
        z = conv(materialised(a), weight, geometry)
        return z, bn_stats(z) if stats else None
    (down, right), matrix = geometry.stride, weight.flatten(1).contiguous()
    if (down, right) != (1, 1):
        a = a._replace(z=a.z[:, :, ::down, ::right], y=None) if isinstance(a, Norm) else a[:, :, ::down, ::right]
    args = _operands.act(prepare(a, weight.shape[0]))
    (outputs, channels), count = matrix.shape, _operands.rows(args.x)
    z = _operands.empty_rows(args.x, outputs)
    tile = _table.tile("conv_stats", z.dtype, outputs, arch(z))
    blocks, columns = -(-count // tile.rows), -(-outputs // tile.channels)
    partial = torch.empty((blocks, 2, outputs), dtype=torch.float32, device=z.device) if stats else None
    launch(
        _conv_stats, blocks * columns, z, args, matrix, z, partial, count, channels, outputs, RELU=_operands.relu(a),
        EVEN_C=channels % tile.depth == 0, EVEN_K=outputs % tile.channels == 0, PRECISION=_operands.precision(z),
        BLOCK_M=tile.rows, BLOCK_N=tile.channels, BLOCK_K=tile.depth, **tile.options,
    )
    return z, merge_moments(partial, tile.rows, count) if stats else None


def is_product(weight: Tensor, geometry: Geometry) -> bool:
    """Whether a convolution is a 1x1 without groups and padding, any stride."""
    return weight.shape[2:] == (1, 1) and geometry.padding == (0, 0) and geometry.groups == 1
