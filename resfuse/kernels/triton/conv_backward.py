"""conv_backward: a 1x1's gradients from recipes, da = dz @ W + add and dweight = dz.T @ a; other windows by the vendor.

da reads dz's recipe and W once for each column of tiles and the addend once; dweight: `_outer_product.py`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import Act, Addend, BNGrad, Geometry, Grad, Masked, Strided, Summed
from ..vendor import conv_grads
from . import _operands, _table
from ._few_channels import few_wgrad, fits
from ._launch import arch, launch
from ._narrow import dgrad_narrow
from ._outer_product import outer_product
from ._tiles import add_grad_product, load_grad
from ._window import conv_window_dgrad, conv_window_wgrad
from .apply import materialised
from .conv_stats import is_product
from .prepare import prepare
from .select import written


class StridedArgs(NamedTuple):
    """compact [N, H/down, W/right] rows of C; width and pixels of the whole, and of the compact tensor."""

    compact: Tensor
    down: int
    right: int
    width: int
    pixels: int
    compact_width: int
    compact_pixels: int


NOT_STRIDED = StridedArgs(*7 * (None,))


@triton.jit(do_not_specialize=["M"])
def _conv_dgrad(
    g,  # GradArgs [M, K]
    weight,  # [K, C] storage
    add,  # GradArgs [M, C], or nothing
    strided,  # StridedArgs, or nothing
    da,  # [M, C] storage
    M, K, C,
    EVEN_K: tl.constexpr, EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(C, BLOCK_N)
    first = tl.program_id(0) % columns * BLOCK_N
    index = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    cols, inside = first + tl.arange(0, BLOCK_N), index < M
    held = inside[:, None] if EVEN_C else inside[:, None] & (cols < C)[None, :]
    if add.dout is not None:
        beside = load_grad(add, index, first, inside, C, EVEN_C, BLOCK_M, BLOCK_N)
    if strided.compact is not None:
        pixel = index % strided.pixels
        line, column = pixel // strided.width, pixel % strided.width
        there = (line % strided.down == 0) & (column % strided.right == 0)
        row = (index // strided.pixels).to(tl.int64) * strided.compact_pixels
        row += line // strided.down * strided.compact_width + column // strided.right
        beside = tl.load(strided.compact + row[:, None] * C + cols[None, :], mask=held & there[:, None], other=0.0)
    acc = add_grad_product(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), g, weight, index, inside, cols, K, C, EVEN_K, EVEN_C, PRECISION,
        BLOCK_M, BLOCK_K,
    )
    if add.dout is not None or strided.compact is not None:
        acc += beside.to(tl.float32)
    tl.store(da + index.to(tl.int64)[:, None] * C + cols[None, :], acc.to(da.dtype.element_ty), mask=held)


def conv_backward(
    grad: Grad, a: Act, weight: Tensor, geometry: Geometry, add: Addend, needs: tuple[bool, bool],
    mean: Tensor | None = None,
) -> tuple[Tensor | Summed | None, Tensor | None]:
    if not is_product(weight, geometry) or geometry.stride != (1, 1):
        return _window(grad, a, weight, geometry, add, needs, mean)
    da = dweight = None
    if all(needs) and isinstance(grad, Masked | BNGrad) and _table.written_first(_tensor(grad), arch(weight)):
        grad = written(grad)
    if needs[0]:
        da = _dgrad(grad, weight.flatten(1).contiguous(), add)
    if needs[1]:
        dweight = outer_product(grad, prepare(a, weight.shape[0]), None, sums=False)[0].view(weight.shape)
    return da, dweight


def _dgrad(grad: Grad, matrix: Tensor, add: Addend) -> Tensor:
    args, (outer, channels) = _operands.grad(grad), matrix.shape
    da, count = _operands.empty_rows(args.dout, channels), _operands.rows(args.dout)
    beside, strided = _operands.NO_GRAD, NOT_STRIDED
    if isinstance(add, Strided):
        strided = _strided(add, da)
    elif add is not None:
        beside = _operands.grad(add)
    if beside is not _operands.NO_GRAD and _table.narrow(da, outer, arch(da)):
        dgrad_narrow(args, matrix, beside, da, _table.tile("dgrad_narrow", da.dtype, channels, arch(da)))
        return da
    plain = isinstance(grad, Tensor) and strided is NOT_STRIDED  # whose addresses would spill
    name = "conv_backward of tensors" if plain else "conv_backward"
    tile = _table.tile(name, da.dtype, channels, arch(da))
    launch(
        _conv_dgrad, -(-count // tile.rows) * -(-channels // tile.channels), da, args, matrix, beside, strided, da,
        count, outer, channels, EVEN_K=outer % tile.depth == 0, EVEN_C=channels % tile.channels == 0,
        PRECISION=_operands.precision(da), BLOCK_M=tile.rows, BLOCK_N=tile.channels, BLOCK_K=tile.depth,
        **tile.options,
    )
    return da


def _tensor(grad: Masked | BNGrad) -> Tensor:
    return grad.z if isinstance(grad, BNGrad) else grad.dout


def _strided(add: Strided, whole: Tensor) -> StridedArgs:
    compact = add.compact.contiguous(memory_format=torch.channels_last)
    _operands.check_rows(add=compact)
    (_, _, height, width), (_, _, down, across) = whole.shape, compact.shape
    return StridedArgs(compact, *add.stride, width, height * width, across, down * across)


def _window(
    grad: Grad, a: Act, weight: Tensor, geometry: Geometry, add: Addend, needs: tuple[bool, bool], mean: Tensor | None
) -> tuple[Tensor | Summed | None, Tensor | None]:
    """The gradients of another window than 1x1, each by whoever was measured faster."""
    da = dweight = None
    made = arch(weight)
    if needs[0] and _table.ours("conv_window_dgrad", weight, geometry, made):
        da = conv_window_dgrad(grad, a, weight, geometry, mean if add is None else None)
    if needs[1] and fits(a, weight, geometry) and _table.few_channels(weight.dtype, made):
        dweight = few_wgrad(grad, a, weight, geometry)
    elif needs[1] and _table.ours("conv_window_wgrad", weight, geometry, made):
        dweight = conv_window_wgrad(grad, a, weight, geometry)
    rest = needs[0] and da is None, needs[1] and dweight is None
    if any(rest):
        dz = written(grad) if isinstance(grad, Masked | BNGrad) else grad
        theirs = conv_grads(dz, materialised(a), weight, geometry, rest)
        da, dweight = theirs[0] if rest[0] else da, theirs[1] if rest[1] else dweight
    if da is not None and isinstance(add, Strided):
        down, right = add.stride
        da[:, :, ::down, ::right] += add.compact
    elif da is not None and add is not None:
        da += written(add) if isinstance(add, Masked) else add
    return da, dweight
