"""The Functions' steps as operators of torch's dispatcher, which a graph can hold: one for a block's forward, one for
its backward, one for the updates of its running statistics.

    resfuse::block(Tensor?[] operands, str spec) -> Tensor[]
    resfuse::block_backward(Tensor?[] operands, Tensor?[] saved, Tensor dout, str spec, bool[] needs) -> Tensor[]
    resfuse::norm_relu, resfuse::norm_relu_backward       the same of a BatchNorm without a convolution
    resfuse::update_buffers(Tensor[] stats, SymInt[] counts, Tensor(a!)[] buffers, str settings) -> ()

spec says in JSON what is static. What an operator returns is described without computing it (`Shape`), for the fake
that a graph is traced with and for whoever takes the list apart again. Results are nobody else's memory, and of the
strides that their descriptions promise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import dispatch
from ..kernels.interface import Activation, Geometry, RunningUpdate, Stats, Window, wide
from . import block, bn_relu
from .block import Made, Saved
from .bn_relu import PoolSpec
from .branches import PROJECTION, Inputs, Shortcut, Spec, Steps
from .unit import COVARIANCE, KEEP, Kept, Tensors, Unit, keeps_covariance

library = torch.library.Library("resfuse", "FRAGMENT")
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


class Shape(NamedTuple):
    """A tensor that is promised."""

    size: tuple
    dtype: torch.dtype
    layout: torch.memory_format = torch.contiguous_format


# What is static, as text ---------------------------------------------------------------------------------------


def encode(spec: Spec | PoolSpec) -> str:
    names = {layout: name for name, layout in FORMATS.items()}
    fields = spec._asdict()
    for dynamic in ("running", "pending", "steps"):
        del fields[dynamic]
    fields.update(layout=names[spec.layout], out_layout=names[spec.out_layout])
    return json.dumps(fields, default=float)  # a number that a graph would keep symbolic


@cache
def decode(text: str) -> Spec | PoolSpec:
    fields = json.loads(text)
    fields.update(layout=FORMATS[fields["layout"]], out_layout=FORMATS[fields["out_layout"]], pending=[])
    if "unit" in fields:
        window = fields.pop("window")
        return PoolSpec(
            **{**fields, "unit": _unit(fields["unit"])}, window=_window(window), running=None, steps=bn_relu.DIRECT
        )
    kind, unit, window, counted, stride, *padding = fields.pop("shortcut")
    shortcut = Shortcut(kind, _unit(unit), _window(window), counted, tuple(stride), *padding)
    norm, units = _unit(fields.pop("norm")), tuple(map(_unit, fields.pop("units")))
    return Spec(**fields, norm=norm, units=units, shortcut=shortcut, running=(), steps=block.DIRECT)


def _unit(fields: list | None) -> Unit | None:
    if fields is None:
        return None
    geometry, *rest, act = fields
    if geometry is not None:
        *pairs, groups = geometry
        geometry = Geometry(*map(tuple, pairs), groups)
    return Unit(geometry, *rest, None if act is None else Activation(*act))


def _window(fields: list | None) -> Window | None:
    if fields is None:
        return None
    *pairs, ceil_mode = fields
    return Window(*map(tuple, pairs), ceil_mode)


# What is promised ----------------------------------------------------------------------------------------------


def describe_block(spec: Spec, flat: Sequence[Tensor | None]) -> Made:
    """`block.forward`'s result, a Shape for each tensor."""
    inputs = Inputs.arrange(spec, flat)
    x = inputs.parts[0]
    dtype, exact = x.dtype, wide(x.dtype)
    size = (x.shape[0], sum(part.shape[1] for part in inputs.parts), *x.shape[2:])
    kept, stats, zs, shortcut_z = [], [], [], None

    def add(unit: Unit, channels: int, read: tuple) -> None:
        vector, input_mean, cov = Shape((channels,), exact), None, None
        if unit.form == COVARIANCE and unit.batch:
            input_mean = Shape((read[1],), exact)
            if keeps_covariance(read, dtype):
                cov = Shape((read[1], read[1]), exact)
        kept.append(Kept(vector, vector, vector, vector, input_mean, cov))
        stats.append(Stats(vector, vector) if unit.batch else None)

    if spec.norm is not None:
        add(spec.norm, size[1], size)
    out = size
    for unit, t in zip(spec.units, inputs.units, strict=True):
        before, out = out, _convolved(out, unit, t)
        add(unit, out[1], (*before[:2], *out[2:]))
        if unit.form == KEEP:
            zs.append(Shape(out, dtype, spec.layout))
    if spec.shortcut.kind == PROJECTION:
        unit, t, window = spec.shortcut.unit, inputs.shortcut[0], spec.shortcut.window
        source = size if window is None else (*size[:2], *window.spatial(size[2:]))
        beside = _convolved(source, unit, t)
        add(unit, beside[1], (*source[:2], *beside[2:]))
        if unit.form == KEEP:
            shortcut_z = Shape(beside, dtype, spec.layout)
    saved, own = None, None
    if spec.differentiable:
        mask = None
        if block.mask_needed(spec):
            mask = Shape((out[0] * out[2] * out[3], -(-out[1] // 8)), torch.uint8)
        saved = Saved(tuple(zs), shortcut_z, mask, tuple(kept))
    if spec.want_stats:
        own = Stats(Shape((out[1],), exact), Shape((out[1],), exact))
    return Made(Shape(out, dtype, spec.out_layout), own, saved, tuple(stats))


def _convolved(size: tuple, unit: Unit, t: Tensors) -> tuple:
    return size[0], t.weight.shape[0], *unit.geometry.spatial(size[2:], t.weight.shape[2:])


def describe_bn_relu(spec: PoolSpec, flat: Sequence[Tensor | None]) -> bn_relu.Made:
    """`bn_relu.forward`'s result, a Shape for each tensor."""
    x, saved, argmax = flat[0], None, None
    vector, size = Shape((x.shape[1],), wide(x.dtype)), tuple(x.shape)
    if spec.window is not None:
        size = (*size[:2], *spec.window.spatial(size[2:]))
        argmax = Shape(size, torch.uint8, spec.layout)
    if spec.differentiable:
        saved = (argmax, vector, vector, vector, vector, None)
    stats = Stats(vector, vector) if spec.unit.batch else None
    return bn_relu.Made(Shape(size, x.dtype, spec.out_layout), saved, stats)


def describe_gradients(spec: Spec | PoolSpec, flat: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """Empty tensors like the gradients that are needed: of activations in out's layout, else as their operands lie."""
    return [
        torch.empty_like(t, memory_format=_layout(spec, i))
        for i, (t, need) in enumerate(zip(flat, needs, strict=True)) if need
    ]  # fmt: skip


def _layout(spec: Spec | PoolSpec, i: int) -> torch.memory_format:
    """Of the gradient of operand i."""
    return spec.out_layout if i < (spec.parts if isinstance(spec, Spec) else 1) else torch.preserve_format


# Lists of tensors ------------------------------------------------------------------------------------------------


def leaves(tree: Any) -> Iterator:
    """The tensors or Shapes of nested tuples, in order, without what is None."""
    if isinstance(tree, (Tensor, Shape)):
        yield tree
    elif tree is not None:
        for branch in tree:
            yield from leaves(branch)


def filled(tree: Any, values: Iterator[Tensor]) -> Any:
    """The tree with its Shapes replaced by tensors, in order."""
    if tree is None or isinstance(tree, Shape):
        return tree and next(values)
    branches = [filled(branch, values) for branch in tree]
    return type(tree)(*branches) if hasattr(tree, "_fields") else tuple(branches)


def _owned(results: Sequence[Tensor], operands: Sequence[Tensor | None]) -> list[Tensor]:
    """The results, copied where they are memory of an operand or of another result."""
    seen, owned = {t.untyped_storage().data_ptr() for t in operands if t is not None}, []
    for t in results:
        storage = t.untyped_storage().data_ptr()
        owned.append(t.clone() if storage in seen else t)
        seen.add(storage)
    return owned


# Operators ------------------------------------------------------------------------------------------------------


def _define(name: str, steps: Steps, describe: Callable) -> Steps:
    """A Function's two operators, and the steps that call them."""
    library.define(f"{name}(Tensor?[] operands, str spec) -> Tensor[]")
    library.define(
        f"{name}_backward(Tensor?[] operands, Tensor?[] saved, Tensor dout, str spec, bool[] needs) -> Tensor[]"
    )

    def run(operands, text):
        return _owned(list(leaves(steps.forward(decode(text), operands))), operands)

    def fake(operands, text):
        return [
            torch.empty(s.size, dtype=s.dtype, device=operands[0].device, memory_format=s.layout)
            for s in leaves(describe(decode(text), operands))
        ]

    def run_backward(operands, saved, dout, text, needs):
        spec = decode(text)
        found = zip(steps.backward(spec, operands, saved, dout, needs), operands, needs, strict=True)
        laid_out = [_laid_out(t, like, _layout(spec, i)) for i, (t, like, need) in enumerate(found) if need]
        return _owned(laid_out, [*operands, *saved, dout])

    def fake_backward(operands, saved, dout, text, needs):
        return describe_gradients(decode(text), operands, needs)

    for op, function, shape in ((name, run, fake), (f"{name}_backward", run_backward, fake_backward)):
        library.impl(op, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"resfuse::{op}", shape, lib=library)
    forward_op, backward_op = (getattr(torch.ops.resfuse, op) for op in (name, f"{name}_backward"))

    def forward(spec, flat):
        return filled(describe(spec, flat), iter(forward_op(list(flat), encode(spec))))

    def backward(spec, flat, saved, dout, needs):
        needed = [t is not None and need for t, need in zip(flat, needs, strict=True)]
        found = iter(backward_op(list(flat), list(saved), dout, encode(spec), needed))
        return tuple(next(found) if need else None for need in needed)

    return Steps(forward, backward, update_buffers)


def _laid_out(t: Tensor, operand: Tensor, layout: torch.memory_format) -> Tensor:
    """A gradient as `describe_gradients` promises it."""
    if layout != torch.preserve_format:
        return t.contiguous(memory_format=layout)
    if all(a == b or n == 1 for n, a, b in zip(t.shape, t.stride(), operand.stride(), strict=True)):
        return t
    return torch.empty_like(operand).copy_(t)


library.define("update_buffers(Tensor[] stats, SymInt[] counts, Tensor(a!)[] buffers, str settings) -> ()")


def update_buffers(pending: Sequence[RunningUpdate], backend: str, device: str, dtype: torch.dtype) -> None:
    """`kernels.update_running` as an operator. settings: backend, dtype, and for each update its momentum and which of
    its buffers are there."""
    if not pending:
        return
    buffers = [(u.running_mean, u.running_var, u.num_batches_tracked) for u in pending]
    updates = [
        (None if u.momentum is None else float(u.momentum), [t is not None for t in found])
        for u, found in zip(pending, buffers, strict=True)
    ]
    torch.ops.resfuse.update_buffers(
        [t for u in pending for t in u.stats], [u.count for u in pending],
        [t for found in buffers for t in found if t is not None],
        json.dumps([backend, str(dtype).removeprefix("torch."), updates]),
    )  # fmt: skip


def _update_buffers(stats, counts, buffers, settings):
    backend, dtype, updates = json.loads(settings)
    measured, rest, pending = iter(stats), iter(buffers), []
    for count, (momentum, has) in zip(counts, updates, strict=True):
        held = [next(rest) if there else None for there in has]
        pending.append(RunningUpdate(Stats(next(measured), next(measured)), count, *held, momentum))
    dispatch.kernels(backend, stats[0].device.type, getattr(torch, dtype)).update_running(pending)


library.impl("update_buffers", _update_buffers, "CompositeExplicitAutograd")
torch.library.register_fake("resfuse::update_buffers", lambda stats, counts, buffers, settings: None, lib=library)

BLOCK = _define("block", block.DIRECT, describe_block)
BN_RELU = _define("norm_relu", bn_relu.DIRECT, describe_bn_relu)
