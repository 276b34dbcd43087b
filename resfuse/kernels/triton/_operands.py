"""Recipes as the kernels take them, and the refusals of what they cannot read. A field that is None costs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..interface import Act, BNGrad, Grad, Masked, Norm, Padded, Reason, Second, Sum, Unsupported
from ..nvidia import check_stored
from ..rounding import rounds_to_tf32
from . import _launch


class View(NamedTuple):
    """Where the rows of a strided view lie: pixels of a sample and of a line, and the strides in values."""

    pixels: int
    width: int
    sample: int
    line: int
    pixel: int


class ActArgs(NamedTuple):
    """x [M, C] storage; scale, shift [C] float32 or None; view None where rows follow one another."""

    x: Tensor
    scale: Tensor | None
    shift: Tensor | None
    view: View | None


class GradArgs(NamedTuple):
    """dout [M, K] storage, mask [M, ceil(K / its bits)], row_scale [N] float32 of `pixels` rows each, factor; z [M, K]
    storage with the scale and shift [K] float32 of the ReLU below; mean, mean_dy, slope and the scale `times` [K] of
    the BatchNorm below that."""

    dout: Tensor
    mask: Tensor | None
    row_scale: Tensor | None
    factor: float | None
    pixels: int | None
    z: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    mean: Tensor | None
    mean_dy: Tensor | None
    slope: Tensor | None
    times: Tensor | None


class SumArgs(NamedTuple):
    """What a `Sum` has beside its main branch. residual [M, K] storage, or [M, channels] from column `before` on."""

    residual: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    view: View | None
    before: int | None
    channels: int
    row_scale: Tensor | None
    gate: Tensor | None
    factor: float | None
    pixels: int | None


class WindowArgs(NamedTuple):
    """Sizes of a tensor and of what its windows give, and the windows' geometry: size, stride, padding, dilation."""

    height: int
    width: int
    out_height: int
    out_width: int
    rows: int
    columns: int
    down: int
    right: int
    top: int
    left: int
    apart: int
    across: int


# What a kernel may do without comes as a tuple of nothing: a tuple itself cannot be compared with None there.
NO_ACT = ActArgs(*4 * (None,))
NO_GRAD = GradArgs(*12 * (None,))


def act(a: Act) -> ActArgs:
    if isinstance(a, Norm) and a.act is not None:
        raise Unsupported([Reason("activation", f"no kernel but bn_act has {a.act.kind} in its prologue")])
    x, scale, shift = a[:3] if isinstance(a, Norm) else (a, None, None)
    if isinstance(a, Norm) and a.y is not None:
        x, scale, shift = a.y, None, None
    check_stored(_launch.instead, a=x)
    return ActArgs(x, vector(scale), vector(shift), _view(x, "a"))


def relu(a: Act) -> bool:
    """Whether the recipe rectifies."""
    return isinstance(a, Norm) and a.relu and a.y is None


def grad(g: Grad) -> GradArgs:
    recipe = g if isinstance(g, BNGrad) else None
    dy = g.dy if recipe else g
    dout, mask, row_scale, factor = dy if isinstance(dy, Masked) else (dy, None, None, 1.0)
    check_rows(g=dout)
    channels, pixels = dout.shape[1], _pixels(dout, row_scale)
    weighed = (vector(row_scale), factor) if row_scale is not None or factor != 1 else (None, None)
    if recipe is None:
        return GradArgs(dout, words(mask, channels), *weighed, pixels, *7 * (None,))
    z = recipe.z if recipe.shift is not None or recipe.slope is not None else None
    check_rows(z=z)
    vectors = map(
        vector, (recipe.scale, recipe.shift, recipe.mean, recipe.mean_dy, recipe.slope, recipe.scale)
    )
    return GradArgs(dout, words(mask, channels), *weighed, pixels, z, *vectors)


def total(s: Sum, like: Tensor, channels: int) -> SumArgs:
    """The operands of a sum [M, channels]; of a `Second` nothing, which is a product of its own."""
    residual, scale, shift, before, held = s.residual, None, None, None, channels
    if isinstance(residual, Second):
        residual = None
    if isinstance(residual, Norm):
        residual, scale, shift = residual.z, vector(residual.scale), vector(residual.shift)
    elif isinstance(residual, Padded):
        residual, before = residual.x, residual.before
        held = residual.shape[1]
    view = None
    if residual is not None:
        check_stored(_launch.instead, residual=residual)
        view = _view(residual, "residual")
    check_rows(gate=s.gate)
    factor = None if s.scale == 1 else s.scale
    pixels = _pixels(like, s.row_scale)
    return SumArgs(residual, scale, shift, view, before, held, vector(s.row_scale), s.gate, factor, pixels)


def window_args(x: Tensor, out_height: int, out_width: int, geometry: Sequence[tuple[int, int]]) -> WindowArgs:
    """geometry: size, stride, padding, dilation, each (height, width)."""
    return WindowArgs(*x.shape[2:], out_height, out_width, *(side for pair in geometry for side in pair))


def words(mask: Tensor | None, channels: int) -> Tensor | None:
    """The bytes of a mask as words of 32 bits, where its rows are whole words."""
    return mask if mask is None or channels % 32 else mask.view(torch.int32)


def rows(t: Tensor) -> int:
    """M of a tensor [N, C, H, W]."""
    return t.shape[0] * t.shape[2] * t.shape[3]


def empty_rows(like: Tensor, channels: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised [N, channels, H, W] in channels_last."""
    n, _, h, w = like.shape
    return torch.empty(
        (n, channels, h, w), dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last
    )


def check_rows(**tensors: Tensor | None) -> None:
    """Raise Unsupported unless each tensor is stored as the kernels read it and dense in channels_last."""
    check_stored(_launch.instead, **tensors)
    for name, t in tensors.items():
        if t is not None and not t.is_contiguous(memory_format=torch.channels_last):
            raise Unsupported([Reason("layout", f"{name} is not dense in channels_last")])


def vector(t: Tensor | None) -> Tensor | None:
    """A vector as the kernels read it: one value after the other."""
    return t if t is None else t.contiguous()


def precision(t: Tensor) -> str:
    """How products of t are taken: float32 as torch's convolutions take it, 16 bits exactly."""
    return "tf32" if rounds_to_tf32(t) else "ieee"


def _pixels(t: Tensor, row_scale: Tensor | None) -> int | None:
    """Rows of a sample, where a kernel needs it: a number that it does not read would only make for more variants."""
    return None if row_scale is None else t.shape[2] * t.shape[3]


def _view(t: Tensor, name: str) -> View | None:
    if t.is_contiguous(memory_format=torch.channels_last):
        return None
    if t.shape[1] > 1 and t.stride(1) != 1:
        raise Unsupported([Reason("layout", f"{name} is not channels_last, nor a strided view of it")])
    sample, _, line, pixel = t.stride()
    return View(t.shape[2] * t.shape[3], t.shape[3], sample, line, pixel)
