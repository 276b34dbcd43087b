"""What a block has beside its main branch: its input, the shortcut, the sum; and how the Functions pass them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import dispatch
from ..kernels.interface import (
    Act,
    Addend,
    Grad,
    Masked,
    Norm,
    Padded,
    Residual,
    RunningUpdate,
    Second,
    Stats,
    Strided,
    Sum,
    Want,
    Window,
)
from . import replay
from . import unit as units
from .unit import COVARIANCE, KEEP, NONE, Gradients, Kept, Running, Tensors, Unit

NOTHING, IDENTITY, GIVEN, PROJECTION, PADDED = "nothing", "identity", "given", "projection", "padded"


class Shortcut(NamedTuple):
    """What is added to the main branch: its source itself, a given tensor, a unit of the source (averaged over `window`
    first, if there is one), or every stride-th pixel of the source between channels of zeros."""

    kind: str
    unit: Unit | None = None
    window: Window | None = None
    count_include_pad: bool = True
    stride: tuple[int, int] = (1, 1)
    before: int = 0
    channels: int = 0


class Steps(NamedTuple):
    """A Function's forward and backward, and the updates of running statistics after it: as they are, or as operators
    that a graph can hold (`ops.py`)."""

    forward: Callable
    backward: Callable
    update_running: Callable


class Spec(NamedTuple):
    """What is static in one call.

    parts: tensors that side by side are the input; norm: the BatchNorm before the first convolution, None where there
    is none; units: the main branch; running: the buffers that each BatchNorm's statistics update, None for none, in the
    order norm, units, shortcut; pending: where forward leaves those updates; want_stats: return the statistics of out
    too; layout: the memory format inside the block; out_layout: that of out and dx; steps: what makes them.
    """

    parts: int
    norm: Unit | None
    units: tuple[Unit, ...]
    shortcut: Shortcut
    relu: bool
    scale: float
    running: tuple[Running | None, ...]
    pending: list[RunningUpdate]
    backend: str
    differentiable: bool
    want_stats: bool
    layout: torch.memory_format
    out_layout: torch.memory_format
    steps: Steps

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The processes with which some BatchNorm shares its statistics."""
        units_of = (self.norm, *self.units, self.shortcut.unit)
        return next((unit.group for unit in units_of if unit is not None and unit.group is not None), None)


class Inputs(NamedTuple):
    """The tensor arguments of a Function, or a flag or gradient for each. stats: mean and variance of the input, None
    where they are not known; norm, units, shortcut: empty tuples for what there is none of."""

    parts: tuple
    mean: Tensor | None
    var: Tensor | None
    residual: Tensor | None
    row_scale: Tensor | None
    gate: Tensor | None
    norm: tuple[Tensors, ...]
    units: tuple[Tensors, ...]
    shortcut: tuple[Tensors, ...]

    RESIDUAL = 2  # where residual stands after the parts

    @classmethod
    def arrange(cls, spec: Spec, flat: Sequence) -> Inputs:
        """From the order of a Function's arguments."""
        parts, (mean, var, residual, row_scale, gate), rest = flat[: spec.parts], *split(flat[spec.parts :], 5)
        tensors = grouped(rest, Tensors)
        norm = 1 if spec.norm else 0
        n = norm + len(spec.units)
        return cls(tuple(parts), mean, var, residual, row_scale, gate, tensors[:norm], tensors[norm:n], tensors[n:])

    def flat(self) -> list:
        """In the order of a Function's arguments."""
        tensors = (t for group in (*self.norm, *self.units, *self.shortcut) for t in group)
        return [*self.parts, self.mean, self.var, self.residual, self.row_scale, self.gate, *tensors]

    def total(self, spec: Spec, residual: Residual) -> Sum:
        gate = None if self.gate is None else self.gate.contiguous(memory_format=spec.layout)  # it may be broadcast
        return Sum(residual, spec.relu, spec.scale, self.row_scale, gate)


def gradients(parts, residual, gate, norm, found: Sequence[Gradients], shortcut: Gradients | None) -> tuple:
    """In the order of a Function's arguments."""
    groups = [*([] if norm is None else [norm]), *found, *([] if shortcut is None else [shortcut])]
    return (*parts, None, None, residual, None, gate, *(g for group in groups for g in (*group, None, None)))


def update_running(pending: Sequence[RunningUpdate], backend: str, device: str, dtype: torch.dtype) -> None:
    if not pending:
        return
    k = dispatch.kernels(backend, device, dtype)
    tensors = [t for stats, _, mean, var, tracked, _ in pending for t in (*stats, mean, var, tracked)]
    counts = tuple((count, momentum) for _, count, _, _, _, momentum in pending)
    replay.run(k, "update_running", None, tensors, lambda: k.update_running(pending), counts)


# Input -------------------------------------------------------------------------------------------------------


def joined(parts: Sequence[Tensor], layout: torch.memory_format) -> Tensor:
    """Tensors side by side, as one in the block's layout."""
    if len(parts) == 1:
        return parts[0].contiguous(memory_format=layout)
    # A single channel is in either layout, and cat of such would choose its own.
    return torch.cat([p.contiguous(memory_format=layout) for p in parts], 1).contiguous(memory_format=layout)


def separated(dx: Tensor | None, parts: Sequence[Tensor], layout: torch.memory_format) -> list[Tensor | None]:
    """The gradient of each part, its own memory."""
    if dx is None:
        return [None] * len(parts)
    pieces = dx.split([p.shape[1] for p in parts], 1)
    return [piece.contiguous(memory_format=layout) for piece in pieces]


# Shortcut ----------------------------------------------------------------------------------------------------


def shortcut_forward(
    k, shortcut: Shortcut, t: Tensors | None, source: Act, given: Tensor | None, layout: torch.memory_format
) -> tuple[Residual, Stats | None, Kept | None]:
    """The residual, and a projection's batch statistics and vectors."""
    if shortcut.kind == PROJECTION:
        return units.forward(k, shortcut.unit, t, _pooled(k, shortcut, source), units.dtype_of(source))
    return _plain_residual(shortcut, source, given, layout), None, None


def shortcut_again(
    k, shortcut: Shortcut, t: Tensors | None, kept: Kept | None, source: Tensor, given: Tensor | None,
    layout: torch.memory_format, z: Tensor | None,
) -> Residual:
    """The residual of `shortcut_forward`, in backward. z: a projection's, if kept."""
    if shortcut.kind != PROJECTION:
        return _plain_residual(shortcut, source, given, layout)
    a = _pooled(k, shortcut, source) if z is None else None
    return units.again(k, shortcut.unit, t, kept, a, z)


def shortcut_backward(
    k, shortcut: Shortcut, t: Tensors | None, kept: Kept | None, g: Grad, source: Tensor, z: Tensor | None,
    needs_source: bool, needs: Tensors | None,
) -> tuple[Addend, Gradients | None]:
    """The gradient of the source through the shortcut, and of a projection's parameters. z: a projection's, if kept."""
    if shortcut.kind == IDENTITY:
        return (g if needs_source else None), None
    if shortcut.kind == PADDED:
        if not needs_source:
            return None, None
        g = k.select(g) if isinstance(g, Masked) else g
        inside = g[:, shortcut.before : shortcut.before + source.shape[1]]
        return Strided(inside, shortcut.stride), None
    if shortcut.kind != PROJECTION:
        return None, None
    if not (needs_source or any(needs)):
        return None, NONE
    whole, unit = _pooled(k, shortcut, source), shortcut.unit
    a, stride = whole, unit.geometry.stride
    sampled = unit.form != COVARIANCE and stride != (1, 1) and units.is_pointwise(unit, t)
    if sampled:
        a, unit = units.sampled(a, stride), unit._replace(geometry=unit.geometry._replace(stride=(1, 1)))
    da, found = units.backward(k, unit, t, kept, g, a, z, None, None, None, needs_source, needs)
    if sampled and da is not None:
        da = Strided(da, stride)
    if da is not None and shortcut.window is not None:
        if isinstance(da, Strided):
            rows, columns = da.stride
            spread = torch.zeros_like(whole)
            spread[:, :, ::rows, ::columns] = da.compact
            da = spread
        da = k.avg_pool_backward(da, source, shortcut.window, shortcut.count_include_pad)
    return da, found


def kept_output(shortcut: Shortcut, residual: Residual) -> Tensor | None:
    """A projection's raw output, where backward keeps it."""
    return residual.z if shortcut.kind == PROJECTION and shortcut.unit.form == KEEP else None


def _plain_residual(shortcut: Shortcut, source: Tensor, given: Tensor | None, layout: torch.memory_format) -> Residual:
    if shortcut.kind == IDENTITY:
        return source
    if shortcut.kind == GIVEN:
        return given.contiguous(memory_format=layout)
    if shortcut.kind == PADDED:
        rows, columns = shortcut.stride
        return Padded(source[:, :, ::rows, ::columns], shortcut.before, shortcut.channels)
    return None


def _pooled(k, shortcut: Shortcut, source: Act) -> Act:
    return source if shortcut.window is None else k.avg_pool(source, shortcut.window, shortcut.count_include_pad)


# Sum ---------------------------------------------------------------------------------------------------------


def write(k, main: Norm | Second, total: Sum, want: Want):
    """The block's output, by the primitive that suits the main branch."""
    if isinstance(main, Second):
        return k.expand(main.x, main.weight, main.scale, main.shift, total, want)
    return k.apply(main, total, want)


def sum_backward(
    k, spec: Spec, inputs: Inputs, dout: Tensor, mask: Tensor | None, main: Norm | Second | None, residual: Residual
) -> tuple[Grad, Grad, Tensor | None]:
    """The gradients of the main branch's output, of the residual, and of the gate where main is given.

        dgate = g * (row_scale * main - residual)
    """
    plain = Masked(dout, mask, None, spec.scale)
    if inputs.gate is not None:
        g, dgate = k.select(plain), None
        if main is not None:
            negated = main._replace(scale=-main.scale, shift=-main.shift)
            difference = write(k, negated, Sum(residual, relu=False, row_scale=inputs.row_scale), Want()).out
            dgate = -(g * difference)
        inside = g * inputs.gate
        return k.prepare(Masked(inside, None, inputs.row_scale)), g - inside, dgate
    trivial = mask is None and spec.scale == 1
    beside = dout if trivial else k.prepare(plain)
    if inputs.row_scale is None:
        return beside, beside, None
    return k.prepare(plain._replace(row_scale=inputs.row_scale)), beside, None


# Arguments and saved tensors ---------------------------------------------------------------------------------


def split(sequence: Sequence, at: int) -> tuple[Sequence, Sequence]:
    return sequence[:at], sequence[at:]


def grouped(flat: Sequence, kind: type) -> tuple:
    size = len(kind._fields)
    return tuple(kind(*flat[i : i + size]) for i in range(0, len(flat), size))
