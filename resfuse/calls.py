"""From checked arguments to a Function: what `functional` documents, made here once for eager mode and for graphs.

`block` and `bn_relu` validate, choose each convolution's form, describe the call in a `Spec`, apply the Function and
make the updates of running statistics that its forward left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import checkpoint

from . import arguments
from .arguments import BN, ArgumentError, Conv, ConvBN, Pooled, ZeroPad
from .functions import block as block_steps
from .functions import bn_relu as bn_relu_steps
from .functions import branches, cost
from .functions.block import BlockFunction
from .functions.bn_relu import BNReluFunction, PoolSpec
from .functions.branches import Inputs, Shortcut, Spec, Steps
from .functions.image import ImageFunction, ImageSpec
from .functions.unit import COVARIANCE, KEEP, LINEAR, RECOMPUTE, Running, Tensors, Unit
from .kernels import dispatch
from .kernels.interface import Stats, Window, wide

# Raised out of a checkpointed recomputation once its tensors are back; a private name, so perhaps not in every torch.
_StopRecomputation = getattr(checkpoint, "_StopRecomputationError", ())
SMALL_SAMPLE = 1 << 15  # values
UNBIASED = 1 << 62  # so many values that n / (n - 1) is 1: of a variance that is unbiased already


def bn_relu(
    x: Tensor, bn: BN, pool: Window | None, stats: Stats | None, *, backend: str, steps: Steps = bn_relu_steps.DIRECT
) -> Tensor:
    """`functional.bn_relu`."""
    spec, flat = described_pool(x, bn, pool, stats, backend=backend, steps=steps)
    return run(BNReluFunction, spec, flat, x.device.type, x.dtype)


def image_conv(x: Tensor, conv: Conv, stats: bool, *, backend: str) -> tuple[Tensor, Stats | None] | None:
    """`functional.image_conv`."""
    dtype = arguments.storage_dtype(x)
    k = dispatch.kernels(backend, x.device.type, dtype)
    if conv.bias is not None or torch._C._len_torch_dispatch_stack() > 0:
        return None
    if not (_suggests_channels_last(x) or _suggests_channels_last(conv.weight)):  # nor would its result be
        return None
    if not k.takes_image(x, dtype, conv.weight, conv.geometry):
        return None
    arguments.check_image(x)
    arguments.output_shape(x.shape, conv, "conv")
    arguments.check_tensors(x, dtype, conv, conv.weight.shape[0], "conv")
    z, mean, var = ImageFunction.apply(ImageSpec(conv.geometry, stats, backend), x.to(dtype), conv.weight)
    return z, Stats(mean, var) if stats else None


def described_pool(
    x: Tensor, bn: BN, pool: Window | None, stats: Stats | None, *, backend: str, steps: Steps = bn_relu_steps.DIRECT
) -> tuple[PoolSpec, list[Tensor | None]]:
    """The call, checked."""
    arguments.check_plain(x, "x")
    shape = arguments.check_parts([x])
    arguments.check_tensors(x, x.dtype, bn, shape[1], "bn")
    arguments.check_values_per_channel(bn, shape)
    if pool is not None:
        arguments.pooled_shape(shape, pool, "pool")
        if math.prod(pool.size) > 255:
            raise ArgumentError(f"pool.size must hold at most 255 values, got {pool.size}")
    steps, tensors = _watched(steps, bn), _tensors(bn)
    layout = torch.channels_last if _suggests_channels_last(x) else torch.contiguous_format
    inside = _inside(x, shape, layout)
    spec = PoolSpec(
        Unit(None, bn.eps, bn.batch, KEEP, bn.group), pool, _running(bn, _rows(shape)), [], backend,
        differentiable([x, *tensors]), inside, layout, steps,
    )
    return spec, [x, *_known(stats, bn, x, x.dtype, shape[1]), *tensors]


class Form(NamedTuple):
    """How a convolution's output is made and what becomes of it (`functions/unit.py`).

    rows: fewer than so many batch rows have the form `recompute` instead, and fewer than `few` the form `keep`; None:
    it depends on nothing.
    """

    kind: str
    rows: float | None = None
    few: int = 0

    def __str__(self) -> str:
        if self.rows == cost.NEVER:
            return RECOMPUTE
        return self.kind if self.rows is None else f"{self.kind} from {self.rows} rows"

    def at(self, rows: int, batch: bool) -> str:
        """The form for a number of rows, with batch or constant statistics."""
        if self.rows is None or not batch or (self.rows != cost.NEVER and rows >= self.rows):
            return self.kind
        return KEEP if rows < self.few else RECOMPUTE


def forms(convs: Sequence[ConvBN | Conv], shortcut: ConvBN | Conv | None) -> list[Form]:
    """The form of each convolution of a main branch and of the projection, where there is one.

    The inner ones keep their raw outputs. The others drop theirs where it is a wide 1x1's.
    """
    steps = [1]  # rows of each convolution for a row of the block's output
    for c in reversed(convs[1:]):
        steps.insert(0, steps[0] * math.prod(c.stride))
    macs = sum(step * c.weight.numel() for step, c in zip(steps, convs, strict=True))
    outer = [] if shortcut is None else [shortcut]
    macs += sum(c.weight.numel() for c in outer)
    found = [Form(KEEP)] * (len(convs) - 1)
    for c in (convs[-1], *outer):
        out, in_, *kernel = c.weight.shape
        pointwise = tuple(kernel) == (1, 1) and c.padding == (0, 0)
        # The BatchNorm before a last convolution wants the gradient of every pixel of its input.
        whole = c is not convs[-1] or len(convs) == 1 or c.stride == (1, 1)
        if c.act is not None:
            found.append(Form(KEEP))
        elif isinstance(c, Conv):
            found.append(Form(COVARIANCE if pointwise and c.groups == 1 and whole else LINEAR))
        elif whole and c.group is None and cost.has_covariance_form(tuple(kernel), c.padding, c.groups, in_, out):
            found.append(_covariance_form(in_, out, macs, c.weight.is_cuda))
        else:
            found.append(Form(RECOMPUTE if pointwise and out >= in_ * c.groups else KEEP))
    return found


def _covariance_form(in_: int, out: int, macs: int, gpu: bool) -> Form:
    rows = cost.gpu_covariance_rows(in_, out) if gpu else cost.covariance_rows(in_, out, macs)
    return Form(COVARIANCE, rows, cost.few_rows(in_))


def block(
    parts: list[Tensor], bn: BN | None, convs: Sequence[ConvBN | Conv], shortcut, *, relu: bool, scale: float = 1.0,
    row_scale: Tensor | None = None, gate: Tensor | None = None, stats: Stats | None = None, want_stats: bool = False,
    backend: str, steps: Steps = block_steps.DIRECT,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Everything else that `functional` has: out, or (out, mean, var) where want_stats. bn: before the first
    convolution; shortcut: as documented there, or "nothing"."""
    x, dtype = parts[0], arguments.storage_dtype(parts[0])
    weights = dict(relu=relu, scale=scale, row_scale=row_scale, gate=gate)
    spec, inputs = described(
        parts, dtype, bn, convs, shortcut, **weights, stats=stats, want_stats=want_stats, backend=backend, steps=steps
    )
    return run(BlockFunction, spec, inputs.flat(), x.device.type, dtype)


def described(
    parts: list[Tensor], dtype: torch.dtype, bn: BN | None, convs: Sequence[ConvBN | Conv], shortcut, *, relu: bool,
    scale: float, row_scale: Tensor | None, gate: Tensor | None, stats: Stats | None, want_stats: bool, backend: str,
    steps: Steps = block_steps.DIRECT,
) -> tuple[Spec, Inputs]:
    """A block's call, checked. parts may be what a block before is going to write (`lean.Promised`)."""
    x = parts[0]
    kind, projection = _shortcut_kind(shortcut, len(parts))
    if convs and convs[-1].act is not None and kind == branches.NOTHING:
        relu, convs = False, convs if relu else [*convs[:-1], convs[-1]._replace(act=None)]
    eager = steps is block_steps.DIRECT  # in a graph sizes may be symbols
    settled = (_settled_before if eager else _settled)(parts, dtype, bn, convs, shortcut, kind, projection)
    steps = _watched(steps, bn, *convs, projection)
    row_scale, gate = _check_sum(x, dtype, kind, scale, row_scale, gate, settled.out)
    norms, outer = [] if bn is None else [bn], [] if projection is None else [projection]
    tensors = [_tensors(c) for c in (*norms, *convs, *outer)]
    n = len(norms) + len(convs)
    inputs = Inputs(
        tuple(part.to(dtype) for part in parts), *_known(stats, bn, x, dtype, settled.channels),
        shortcut.to(dtype) if kind == branches.GIVEN else None, row_scale, gate,
        tuple(tensors[: len(norms)]), tuple(tensors[len(norms) : n]), tuple(tensors[n:]),
    )
    spec = Spec(
        parts=len(parts),
        norm=settled.norm,
        units=settled.units,
        shortcut=settled.shortcut,
        relu=relu,
        scale=scale,
        running=tuple(map(_running, (*norms, *convs, *outer), settled.counts)),
        pending=[],
        backend=backend,
        differentiable=differentiable(inputs.flat()),
        want_stats=want_stats,
        layout=settled.layout,
        out_layout=settled.out_layout,
        steps=steps,
    )
    return spec, inputs


def _watched(steps: Steps, *parts: BN | ConvBN | Conv | None) -> Steps:
    """The steps as operators where a mode watches them (a flop counter, say): not every kernel is one."""
    if torch._C._len_torch_dispatch_stack() == 0 or any(part is not None and part.group for part in parts):
        return steps
    from .functions import ops  # registers them; of no use elsewhere

    return {block_steps.DIRECT: ops.BLOCK, bn_relu_steps.DIRECT: ops.BN_RELU}.get(steps, steps)


def run(function, spec: Spec | PoolSpec, flat: list[Tensor | None], device: str, dtype: torch.dtype):
    """Apply a Function, then make the updates that its forward left."""
    return updating(partial(function.apply, spec, *flat), [spec], device, dtype)


def updating(call: Callable, specs: Sequence[Spec | PoolSpec], device: str, dtype: torch.dtype):
    """What the call gives; then the updates that the forward of its Functions left in the specs."""
    dispatch.kernels(specs[0].backend, device, dtype)  # a set that cannot run says so before anything has run
    try:
        found = call()
    except _StopRecomputation:  # checkpoint has what it wants; stock BatchNorms have updated by then
        _update(specs, device, dtype)
        raise
    _update(specs, device, dtype)
    return found


def _update(specs: Sequence[Spec | PoolSpec], device: str, dtype: torch.dtype) -> None:
    with torch.no_grad():
        for spec in specs:
            spec.steps.update_running(spec.pending, spec.backend, device, dtype)
            spec.pending.clear()


# What a call's description decides ------------------------------------------------------------------------------


class Settled(NamedTuple):
    """What sizes, strides, dtypes and settings of a call decide, once they are found to fit. channels: of the input;
    out: the main branch's shape; counts: values a channel of each BatchNorm, in the order norm, units, shortcut."""

    channels: int
    out: torch.Size
    norm: Unit | None
    units: tuple[Unit, ...]
    shortcut: Shortcut
    counts: tuple[int, ...]
    layout: torch.memory_format
    out_layout: torch.memory_format


_settled_calls: dict[tuple, Settled] = {}
MOST_SETTLED = 1024


def _settled_before(
    parts: list[Tensor], dtype: torch.dtype, bn: BN | None, convs, shortcut, kind: str, projection
) -> Settled:
    """`_settled`, looked up: the checks of one kind of call are made once."""
    settle = partial(_settled, parts, dtype, bn, convs, shortcut, kind, projection)
    if any(c is not None and c.group for c in (bn, *convs, projection)):  # a process group may end: it is not kept here
        return settle()
    autocast = arguments.autocast_enabled(parts[0].device.type)
    key = dtype, autocast, _kind(parts), _kind(bn), _kind(convs), _kind(shortcut)
    try:
        found = _settled_calls.get(key)
    except TypeError:  # a setting that cannot be a key: a list, say
        return settle()
    if found is None:
        found = settle()
        if len(_settled_calls) >= MOST_SETTLED:
            _settled_calls.clear()
        _settled_calls[key] = found
    return found


def _kind(given):
    """given, for a tensor all that is asked of one before the call."""
    if isinstance(given, Tensor):
        return given.shape, given.stride(), given.dtype, given.device
    if isinstance(given, (list, tuple)):
        return type(given), *map(_kind, given)
    return given


def _settled(
    parts: list[Tensor], dtype: torch.dtype, bn: BN | None, convs: Sequence[ConvBN | Conv], shortcut, kind: str,
    projection: ConvBN | Conv | None,
) -> Settled:
    x, shape = parts[0], arguments.check_parts(parts)
    shapes = _check_block(x, dtype, shape, bn, convs, shortcut, projection)
    rows = list(map(_rows, shapes))
    outer = [] if projection is None else [projection]
    units = [
        Unit(c.geometry, getattr(c, "eps", None), c.batch, form.at(count, c.batch), c.group, c.act)
        for c, form, count in zip((*convs, *outer), forms(convs, projection), rows, strict=True)
    ]
    channels_last = all(map(_suggests_channels_last, parts)) or any(_suggests_channels_last(c.weight) for c in convs)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return Settled(
        channels=shape[1],
        out=shapes[len(convs) - 1],
        norm=None if bn is None else Unit(None, bn.eps, bn.batch, KEEP, bn.group),
        units=tuple(units[: len(convs)]),
        shortcut=_static_shortcut(kind, shortcut, units[len(convs) :]),
        counts=(*([] if bn is None else [_rows(shape)]), *rows),
        layout=_inside(x, shape, layout),
        out_layout=layout,
    )


# Arguments ---------------------------------------------------------------------------------------------------


def _shortcut_kind(shortcut, parts: int) -> tuple[str, ConvBN | Conv | None]:
    """What kind of shortcut it is, and its convolution."""
    if isinstance(shortcut, (ConvBN, Conv, Pooled)):
        return branches.PROJECTION, shortcut.conv if isinstance(shortcut, Pooled) else shortcut
    if isinstance(shortcut, Tensor):
        return branches.GIVEN, None
    if isinstance(shortcut, str) and shortcut == branches.NOTHING:
        return branches.NOTHING, None
    if shortcut is not None and not isinstance(shortcut, ZeroPad):
        raise ArgumentError(
            f"shortcut must be None, a ConvBN, Conv, Pooled, ZeroPad or a tensor, got {type(shortcut).__name__}"
        )
    if parts > 1:
        raise ArgumentError(f"shortcut: of {parts} tensors side by side only a convolution or a tensor can be added")
    return (branches.IDENTITY if shortcut is None else branches.PADDED), None


def _static_shortcut(kind: str, shortcut, unit: list[Unit]) -> Shortcut:
    if kind == branches.PADDED:
        return Shortcut(kind, stride=shortcut.stride, before=shortcut.before, channels=shortcut.channels)
    if isinstance(shortcut, Pooled):
        return Shortcut(kind, unit[0], shortcut.window, shortcut.count_include_pad)
    return Shortcut(kind, *unit)


def _check_block(
    x: Tensor, dtype: torch.dtype, shape: torch.Size, bn: BN | None, convs, shortcut, projection
) -> list[torch.Size]:
    """Every check of what the block is made of; the output shapes of the main branch and of a projection."""
    if not convs:
        raise ArgumentError("convs: at least one convolution is needed")
    if bn is not None:
        arguments.check_tensors(x, dtype, bn, shape[1], "bn")
        arguments.check_values_per_channel(bn, shape)
    names, shapes = [f"conv{i}" for i in range(1, len(convs) + 1)], []
    for i, (c, name) in enumerate(zip(convs, names, strict=True)):
        wanted = Conv if bn is not None and i + 1 == len(convs) else ConvBN
        if not isinstance(c, wanted):
            raise ArgumentError(f"{name} must be a {wanted.__name__}, got {type(c).__name__}")
        shapes.append(arguments.output_shape(shapes[-1] if shapes else shape, c, name))
        arguments.check_tensors(x, dtype, c, c.weight.shape[0], name)
    arguments.check_activations(convs, projection, not isinstance(shortcut, str))
    last, which, other = shapes[-1], "x, the identity shortcut,", shape
    if projection is not None:
        source = shape
        if isinstance(shortcut, Pooled):
            source = arguments.pooled_shape(shape, shortcut.window, "shortcut")
        shapes.append(arguments.output_shape(source, projection, "shortcut"))
        arguments.check_tensors(x, dtype, projection, projection.weight.shape[0], "shortcut")
        which, other = "shortcut's output", shapes[-1]
    elif isinstance(shortcut, ZeroPad):
        which, other = "shortcut's output", _padded_shape(shape, shortcut)
    elif isinstance(shortcut, Tensor):
        arguments.check_plain(shortcut, "shortcut")
        arguments.check_image(shortcut, "shortcut")
        which, other = "shortcut", shortcut.shape
        if shortcut.device != x.device:
            raise ArgumentError(f"shortcut is on {shortcut.device}, x on {x.device}; all must be on one device")
        if arguments.storage_dtype(shortcut, "shortcut") != dtype:
            raise ArgumentError(f"shortcut is {shortcut.dtype}; x in {dtype} takes that")
    elif shortcut is not None:
        other = last
    if last != other:
        raise ArgumentError(f"{name}'s output {tuple(last)} and {which} {tuple(other)} must have the same shape")
    for c, its in zip((*convs, *([] if projection is None else [projection])), shapes, strict=True):
        arguments.check_values_per_channel(c, its)
    return shapes


def _padded_shape(shape: torch.Size, shortcut: ZeroPad) -> torch.Size:
    n, c, h, w = shape
    if not (0 <= shortcut.before <= shortcut.channels - c and min(shortcut.stride) > 0):
        raise ArgumentError(f"shortcut: {c} channels after {shortcut.before} of zeros do not fit {shortcut}")
    return torch.Size((n, shortcut.channels, -(-h // shortcut.stride[0]), -(-w // shortcut.stride[1])))


def _check_sum(
    x: Tensor, dtype: torch.dtype, kind: str, scale: float, row_scale: Tensor | None, gate: Tensor | None,
    shape: torch.Size,
) -> tuple[Tensor | None, Tensor | None]:
    """row_scale and gate as the Function wants them."""
    weighed = scale != 1 or row_scale is not None or gate is not None
    if kind == branches.NOTHING and weighed:
        raise ArgumentError("scale, row_scale and gate weigh a sum; without a shortcut there is none")
    if not (isinstance(scale, (int, float)) and 0 < scale < math.inf):
        raise ArgumentError(f"scale must be a positive number, got {scale!r}")
    if row_scale is not None:
        arguments.check_plain(row_scale, "row_scale")
        if row_scale.shape != shape[:1] or row_scale.device != x.device or row_scale.requires_grad:
            raise ArgumentError(
                f"row_scale must be [{shape[0]}] on {x.device} and require no gradient, got {tuple(row_scale.shape)} "
                f"on {row_scale.device}, requires_grad={row_scale.requires_grad}"
            )
        row_scale = row_scale.to(wide(dtype)).contiguous()
    if gate is not None:
        arguments.check_plain(gate, "gate")
        if gate.device != x.device:
            raise ArgumentError(f"gate is on {gate.device}, x on {x.device}; all must be on one device")
        try:
            gate = gate.to(dtype).expand(shape)
        except RuntimeError:
            raise ArgumentError(f"gate {tuple(gate.shape)} does not broadcast to the output {tuple(shape)}") from None
    return row_scale, gate


def _known(
    stats: Stats | None, bn: BN | None, x: Tensor, dtype: torch.dtype, channels: int
) -> tuple[Tensor | None, Tensor | None]:
    """Statistics of the input that were given and are wanted."""
    if stats is None:
        return None, None
    for name, t in zip(Stats._fields, stats, strict=True):
        if not isinstance(t, Tensor) or t.shape != (channels,) or t.device != x.device:
            raise ArgumentError(f"stats.{name} must be a tensor [{channels}] on {x.device}, got {t!r}")
    if bn is None or not bn.batch:
        return None, None
    return tuple(t.to(wide(dtype)).contiguous() for t in stats)


def _rows(shape: torch.Size) -> int:
    """Not through torch.Size.numel, which would fix a graph's batch."""
    return shape[0] * shape[2] * shape[3]


def differentiable(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _inside(x: Tensor, shape: torch.Size, layout: torch.memory_format) -> torch.memory_format:
    """The layout inside a block. Contiguous (NCHW) samples are read one at a time: of small ones the calls would cost
    more than a conversion does."""
    return torch.channels_last if x.is_cuda or shape[1:].numel() < SMALL_SAMPLE else layout


def _suggests_channels_last(t: Tensor) -> bool:
    """Whether a convolution reading t would write channels_last: torch's rule (suggest_memory_format), by strides."""
    size, stride, least = t.shape, t.stride(), 0
    if stride[1] == 0:
        return False
    for d in (1, 3, 2, 0):
        if stride[d] < least or (d == 0 and least == stride[1]):
            return False
        least = stride[d] * max(size[d], 1)
    return True


def _tensors(c: BN | ConvBN | Conv) -> Tensors:
    """The unit's tensors: running buffers only where they are read."""
    if isinstance(c, Conv):  # as a BatchNorm that does nothing
        zero = torch.zeros(c.weight.shape[0], dtype=wide(c.weight.dtype), device=c.weight.device)
        return Tensors(c.weight, c.bias, None, None, zero, torch.ones_like(zero))
    constant = (None, None) if c.batch else (c.running_mean.clone(), c.running_var.clone())  # later steps update them
    return Tensors(getattr(c, "weight", None), getattr(c, "bias", None), c.gamma, c.beta, *constant)


def _running(c: BN | ConvBN | Conv, count: int) -> Running | None:
    """What the batch's statistics update: buffers in training, nothing otherwise."""
    if isinstance(c, Conv) or not c.training or (c.running_mean is None and c.num_batches_tracked is None):
        return None
    count = count if c.group is None else UNBIASED
    return Running(c.running_mean, c.running_var, c.num_batches_tracked, c.momentum, count)
