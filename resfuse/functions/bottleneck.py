"""The bottleneck block: 1x1, 3x3, 1x1 with a shortcut, forward and backward.

    z1 = conv1(x)    y1 = relu(bn1(z1))    z2 = conv2(y1)    y2 = relu(bn2(z2))
    out = relu(bn3(conv3(y2)) + (x or bn(conv(x))))

Kept for backward, in tensors of M rows and w channels: x (4, the block before wrote it), z1 (1), z2 (1) and a 1-bit
mask of out; neither wide product (conv3's, the projection's) outlives its direction, and in covariance form neither
is ever written. `docs/math.md` derives each line.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import dispatch
from ..kernels.interface import Act, Addend, Grad, Masked, Norm, RunningUpdate, Second, Strided
from . import composite
from . import unit as units
from .unit import NONE, Gradients, Kept, Running, Tensors, Unit

TENSORS_PER_UNIT = len(Tensors._fields)
KEPT_PER_UNIT = len(Kept._fields)


class Spec(NamedTuple):
    """What is static in one call. units: conv1, conv2, conv3 and, if the shortcut is a projection, its own;
    running: the buffers that each unit's statistics update, None for none; pending: where forward leaves those updates;
    layout: the memory format inside the block; out_layout: that of out and dx."""

    units: tuple[Unit, ...]
    running: tuple[Running | None, ...]
    pending: list[RunningUpdate]
    backend: str
    differentiable: bool
    layout: torch.memory_format
    out_layout: torch.memory_format


class Saved(NamedTuple):
    """What backward reads beside the parameters. mask uint8 [M, ceil(4w/8)]; kept: one `Kept` per unit."""

    x: Tensor
    z1: Tensor
    z2: Tensor
    mask: Tensor
    kept: tuple[Kept, ...]


class BottleneckFunction(torch.autograd.Function):
    """apply(spec, x, *tensors) -> out; the caller then makes the updates in spec.pending.

    x [N, C, H, W] in storage dtype, any strides; tensors: the units' `Tensors`, flat. Weights may be of another
    dtype (autocast): they are cast here, and their gradients come in their own.
    """

    @staticmethod
    def forward(ctx, spec: Spec, x: Tensor, *flat: Tensor | None):
        tensors = _grouped(flat, Tensors)
        k = dispatch.kernels(spec.backend, x.device.type, x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            out, saved, stats = _forward(k, spec, x, tensors)
            out = out.contiguous(memory_format=spec.out_layout)
            spec.pending.extend(units.running_updates(spec.running, stats, tensors))
        if spec.differentiable:
            kept = [t for unit in saved.kept for t in unit]
            ctx.save_for_backward(*flat, saved.x, saved.z1, saved.z2, saved.mask, *kept)
            ctx.spec, ctx.kernels = spec, k
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):
        spec = ctx.spec
        split = TENSORS_PER_UNIT * len(spec.units)
        flat, (x, z1, z2, mask, *kept) = _split(ctx.saved_tensors, split)  # read once: hooks may recompute them
        tensors = _grouped(flat, Tensors)
        saved = Saved(x, z1, z2, mask, _grouped(kept, Kept))
        needs = _grouped(ctx.needs_input_grad[2:], Tensors)
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled():  # create_graph: these gradients will be differentiated
                out = composite.bottleneck(x, spec.units, tensors)
                return None, *composite.differentiable_gradients(out, dout, [x, *flat])
            dx, grads = _backward(ctx.kernels, spec, tensors, saved, dout, ctx.needs_input_grad[1], needs)
            dx = None if dx is None else dx.contiguous(memory_format=spec.out_layout)
        return None, dx, *(g for group in grads for g in (*group, None, None))


def _forward(k, spec: Spec, x: Tensor, tensors: tuple[Tensors, ...]):
    dtype = x.dtype
    conv1, conv2, conv3, *projection = zip(spec.units, tensors, strict=True)
    xs = x.contiguous(memory_format=spec.layout)

    norm1, stats1, kept1 = units.forward(k, *conv1, xs, dtype)
    y1 = k.prepare(norm1._replace(relu=True))
    norm2, stats2, kept2 = units.forward(k, *conv2, y1, dtype)
    del y1
    y2 = k.prepare(norm2._replace(relu=True))
    main, stats3, kept3 = units.forward(k, *conv3, y2, dtype)
    kept, stats, residual = [kept1, kept2, kept3], [stats1, stats2, stats3], xs
    for unit, t in projection:
        residual, stats_d, kept_d = units.forward(k, unit, t, xs, dtype)
        kept.append(kept_d)
        stats.append(stats_d)
    if isinstance(main, Second):
        out, mask = k.expand(y2, main.weight, main.scale, main.shift, residual, spec.differentiable)
    else:
        out, mask = k.apply(main, residual, relu=True, want_mask=spec.differentiable)
    saved = Saved(x, norm1.z, norm2.z, mask, tuple(kept))
    return out, saved, stats


def _backward(
    k, spec: Spec, tensors: tuple[Tensors, ...], saved: Saved, dout: Tensor, needs_x: bool, needs: tuple[Tensors, ...]
) -> tuple[Tensor | None, list[Gradients]]:
    (unit1, unit2, unit3, *_), (t1, t2, t3, *_), (kept1, kept2, kept3, *_) = spec.units, tensors, saved.kept
    x, dout = (t.contiguous(memory_format=spec.layout) for t in (saved.x, dout))
    needs_z1 = needs_x or any(needs[0])
    needs_z2 = needs_z1 or any(needs[1])
    g = k.prepare(Masked(dout, saved.mask))

    add, shortcut = g, []
    if len(spec.units) == 4:
        projection = spec.units[3], tensors[3], saved.kept[3]
        add, shortcut = None, [NONE]
        if needs_x or any(needs[3]):
            add, grads = _wide_backward(k, *projection, g, x, False, needs_x, needs[3])
            shortcut = [grads]

    y2 = k.prepare(Norm(saved.z2, kept2.scale, kept2.shift))
    dy2, grads3 = _wide_backward(k, unit3, t3, kept3, g, y2, unit3.covariance, needs_z2, needs[2])
    if not needs_z2:
        return None, [NONE, NONE, grads3, *shortcut]
    del g
    if not needs_x:
        add = None

    unmasked = None if unit3.covariance else y2
    dz2, dgamma2, dbeta2 = units.backward_deferred(k, unit2, t2, kept2, dy2, saved.z2, unmasked)
    del dy2, y2, unmasked
    y1 = k.prepare(Norm(saved.z1, kept1.scale, kept1.shift))
    dy1, dweight2 = _conv_backward(k, unit2, t2, dz2, y1, None, (needs_z1, needs[1].weight))
    grads2 = units.gradients(unit2, t2, kept2, dweight2, dgamma2, dbeta2)
    del dz2
    if not needs_z1:
        return None, [NONE, grads2, grads3, *shortcut]

    dz1, dgamma1, dbeta1 = units.backward_deferred(k, unit1, t1, kept1, dy1, saved.z1, y1)
    del dy1, y1
    dx, dweight1 = _conv_backward(k, unit1, t1, dz1, x, add, (needs_x, needs[0].weight))
    grads1 = units.gradients(unit1, t1, kept1, dweight1, dgamma1, dbeta1)
    return dx, [grads1, grads2, grads3, *shortcut]


def _wide_backward(
    k, unit: Unit, t: Tensors, kept: Kept, g: Grad, a: Act, relu: bool, needs_input: bool, needs: Tensors
) -> tuple[Tensor | Strided | None, Gradients]:
    """Backward of a unit whose output was not kept: conv3 or the projection; `relu` masks da (covariance form)."""
    if unit.covariance:
        return units.backward_covariance(k, unit, t, kept, g, a, relu, needs_input, needs)
    dtype = (a.z if isinstance(a, Norm) else a).dtype
    z, _ = k.conv_stats(a, t.weight.to(dtype), unit.geometry, stats=False)
    dz, dgamma, dbeta = units.backward_deferred(k, unit, t, kept, g, z, None)
    da, dweight = _conv_backward(k, unit, t, dz, a, None, (needs_input, needs.weight))
    return da, units.gradients(unit, t, kept, dweight, dgamma, dbeta)


def _conv_backward(k, unit: Unit, t: Tensors, dz: Grad, a: Act, add: Addend, needs: tuple[bool, bool]):
    dtype = (a.z if isinstance(a, Norm) else a).dtype
    return k.conv_backward(dz, a, t.weight.to(dtype), unit.geometry, add, needs)


def _split(sequence, at: int) -> tuple:
    return sequence[:at], sequence[at:]


def _grouped(flat, kind: type) -> tuple:
    size = len(kind._fields)
    return tuple(kind(*flat[i : i + size]) for i in range(0, len(flat), size))
