"""Calls that keep less for backward: runs of residual blocks, and a stem.

Of a run each block is checked as in a call of its own, before anything runs; then one Function has them all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import arguments, calls
from .arguments import BN, ArgumentError, Block, Conv
from .functions import stem as stem_steps
from .functions.block import BlockFunction
from .functions.branches import Inputs, Spec
from .functions.run import Run, RunFunction
from .functions.stem import StemFunction, StemSpec
from .functions.unit import KEEP, RECOMPUTE, Tensors, Unit, is_pointwise
from .kernels.interface import Stats, Window


class Promised(NamedTuple):
    """What a block is going to write, as the checks of the next one ask a tensor."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)

    def stride(self) -> tuple[int, ...]:
        return self.strides

    def to(self, dtype: torch.dtype) -> Promised:
        assert dtype == self.dtype  # a block's output is in the run's storage dtype
        return self


def run(
    x: Tensor, blocks: Sequence[Block], stats: Stats | None, *, leanest: bool, backend: str
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`functional.run`."""
    if not blocks:
        raise ArgumentError("blocks: at least one is needed")
    dtype, made, part = arguments.storage_dtype(x), [], x
    for i, b in enumerate(blocks):
        spec, inputs = calls.described(
            [part], dtype, b.bn, b.convs, b.shortcut, relu=b.relu, scale=b.scale, row_scale=b.row_scale, gate=None,
            stats=stats if i == 0 else None, want_stats=b.want_stats, backend=backend,
        )
        made.append((without_wide(spec, inputs) if leanest else spec, inputs))
        part = _written(x, dtype, spec, inputs)
    return calls.updating(partial(_chained, made, leanest), [spec for spec, _ in made], x.device.type, dtype)


def _chained(made: list[tuple[Spec, Inputs]], leanest: bool) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The last block's output, or what `BlockFunction` gives. Frozen blocks before one that trains keep nothing."""
    frozen = next((i for i, (spec, _) in enumerate(made) if spec.differentiable), len(made))
    shared, out = Run(len(made) - frozen, leanest), None
    for i, (spec, inputs) in enumerate(made):
        inputs = inputs if out is None else _reads(spec, inputs, out)
        flat = inputs.flat()
        out = BlockFunction.apply(spec, *flat) if i < frozen else RunFunction.apply(shared, spec, *flat)
    return out


def stem(x: Tensor, conv: Conv, bn: BN, pool: Window | None, *, backend: str) -> Tensor:
    """`functional.stem`."""
    dtype = arguments.storage_dtype(x)
    arguments.check_image(x)
    arguments.output_shape(x.shape, conv, "conv")
    arguments.check_tensors(x, dtype, conv, conv.weight.shape[0], "conv")
    x = x.to(dtype)
    operands = x, conv.weight, conv.bias
    with torch.no_grad():
        z = stem_steps.convolved(*operands, conv.geometry)
    spec, (_, _, _, *tensors) = calls.described_pool(z, bn, pool, None, backend=backend)
    spec = StemSpec(spec._replace(differentiable=True), conv.geometry)
    call = partial(StemFunction.apply, spec, z, *operands, *tensors)
    return calls.updating(call, [spec.pool], x.device.type, dtype)


def without_wide(spec: Spec, inputs: Inputs) -> Spec:
    """The block with what wide 1x1s write, few rows, made again: the same bits, which `calls.forms` would keep."""
    last, shortcut = spec.units[-1], spec.shortcut
    if is_wide(last, inputs.units[-1]) and last.act is None:
        spec = spec._replace(units=(*spec.units[:-1], last._replace(form=RECOMPUTE)))
    if shortcut.unit is not None and is_wide(shortcut.unit, inputs.shortcut[0]):
        spec = spec._replace(shortcut=shortcut._replace(unit=shortcut.unit._replace(form=RECOMPUTE)))
    return spec


def is_wide(unit: Unit, t: Tensors) -> bool:
    out, in_, *_ = t.weight.shape
    return unit.form == KEEP and is_pointwise(unit, t) and out >= in_ * unit.geometry.groups


def _written(x: Tensor, dtype: torch.dtype, spec: Spec, inputs: Inputs) -> Promised:
    """The output of a block that was checked."""
    size = inputs.parts[0].shape
    for unit, t in zip(spec.units, inputs.units, strict=True):
        size = (size[0], t.weight.shape[0], *unit.geometry.spatial(size[2:], t.weight.shape[2:]))
    return promised(torch.Size(size), dtype, x.device, spec.out_layout, spec.differentiable)


def promised(
    size: torch.Size, dtype: torch.dtype, device: torch.device, layout: torch.memory_format, requires_grad: bool = True
) -> Promised:
    _, channels, height, width = size
    if layout == torch.channels_last:
        strides = channels * height * width, 1, channels * width, channels
    else:
        strides = channels * height * width, height * width, width, 1
    return Promised(size, strides, dtype, device, requires_grad)


def _reads(spec: Spec, inputs: Inputs, found: Tensor | tuple[Tensor, Tensor, Tensor]) -> Inputs:
    """A block's inputs, with what the one before it wrote."""
    out, *own = found if isinstance(found, tuple) else (found,)
    if own and spec.norm is not None and spec.norm.batch:
        inputs = inputs._replace(mean=own[0], var=own[1])
    return inputs._replace(parts=(out,))
