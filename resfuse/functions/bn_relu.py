"""BatchNorm and ReLU without a convolution, with or without the max pool of a ResNet's stem.

    y = relu(scale * x + shift)    out = y, or the maxima of its windows

Kept for backward: x and, of a pool, one byte per maximum: y is made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import dispatch
from ..kernels.interface import BNContext, BNGrad, Norm, RunningUpdate, Stats, Sum, Want, Window, wide
from . import branches, composite, replay, sync
from . import unit as units
from .branches import Steps
from .unit import Running, Tensors, Unit


class PoolSpec(NamedTuple):
    """What is static in one call, as in `branches.Spec`; window None: no pool."""

    unit: Unit
    window: Window | None
    running: Running | None
    pending: list[RunningUpdate]
    backend: str
    differentiable: bool
    layout: torch.memory_format
    out_layout: torch.memory_format
    steps: Steps

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The processes with which it shares its statistics."""
        return self.unit.group


class Made(NamedTuple):
    """What forward made. saved: argmax (uint8, None without a pool), mean, invstd, scale, shift and the count of shared
    statistics, or None where nothing will be differentiated; stats None where they are constants."""

    out: Tensor
    saved: tuple[Tensor | None, ...] | None
    stats: Stats | None


class BNReluFunction(torch.autograd.Function):
    """apply(spec, x, mean, var, *tensors) -> out; mean and var of x, or None; tensors: the `Tensors` of a BatchNorm."""

    @staticmethod
    def forward(ctx, spec: PoolSpec, *flat: Tensor | None):
        made = spec.steps.forward(spec, flat)
        x, _, _, *tensors = flat
        spec.pending.extend(units.running_updates([spec.running], [made.stats], [Tensors(*tensors)]))
        if spec.differentiable:
            ctx.save_for_backward(x, *tensors, *made.saved)
            ctx.spec = spec
        return made.out

    @staticmethod
    def backward(ctx, dout: Tensor):
        spec = ctx.spec
        x, *rest = ctx.saved_tensors
        tensors, saved = rest[: len(Tensors._fields)], rest[len(Tensors._fields) :]
        if torch.is_grad_enabled():  # create_graph: these gradients will be differentiated
            sync.check_first_order(spec)
            with torch.autocast(x.device.type, enabled=False):
                dx, *found = composite.input_gradients(
                    lambda flat: composite.bn_relu(flat[0], spec.unit, Tensors(*flat[1:]), spec.window),
                    dout, [x, *tensors],
                )  # fmt: skip
            return None, dx, None, None, *found
        return None, *spec.steps.backward(spec, [x, None, None, *tensors], saved, dout, ctx.needs_input_grad[1:])


def forward(spec: PoolSpec, flat: Sequence[Tensor | None]) -> Made:
    """flat: x, mean, var, and the `Tensors`."""
    k = dispatch.kernels(spec.backend, flat[0].device.type, flat[0].dtype)
    return replay.run(k, "bn_relu", spec, flat, lambda: _forward(k, spec, *flat))


def _forward(k, spec: PoolSpec, x: Tensor, mean: Tensor | None, var: Tensor | None, *tensors: Tensor | None) -> Made:
    t = Tensors(*tensors)
    with torch.autocast(x.device.type, enabled=False):
        xs = x.contiguous(memory_format=spec.layout)
        measured = None
        if spec.unit.batch:
            measured = k.bn_stats(xs) if mean is None else Stats(mean, var)
        kept, measured = units.normalise(k, spec.unit, t, measured, x[:, 0].numel(), wide(x.dtype))
        a, argmax = Norm(xs, kept.scale, kept.shift), None
        if spec.window is None:
            out = k.apply(a, Sum(), Want()).out
        else:
            out, argmax = k.bn_relu_max_pool(a, spec.window)
        out = out.contiguous(memory_format=spec.out_layout)
    saved = (argmax, kept.mean, kept.invstd, kept.scale, kept.shift, kept.count) if spec.differentiable else None
    return Made(out, saved, measured)


def backward(
    spec: PoolSpec, flat: Sequence[Tensor | None], saved: Sequence[Tensor | None], dout: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of flat, as far as they are needed."""
    k = dispatch.kernels(spec.backend, flat[0].device.type, flat[0].dtype)
    return replay.run(
        k, "bn_relu_backward", spec, [*flat, *saved, dout], lambda: _backward(k, spec, flat, saved, dout, needs),
        tuple(needs),
    )


def _backward(k, spec: PoolSpec, flat, saved, dout: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    (x, _, _, *tensors), (argmax, mean, invstd, scale, shift, count) = flat, saved
    t = Tensors(*tensors)
    with torch.autocast(x.device.type, enabled=False):
        a = Norm(x.contiguous(memory_format=spec.layout), scale, shift)
        context = BNContext(mean, invstd, t.gamma, units.own_batch(spec.unit))
        dout = dout.contiguous(memory_format=spec.layout)
        if spec.window is None:
            dz, dgamma, dbeta = k.bn_backward(dout, k.prepare(a), a.z, context)
        else:
            dz, dgamma, dbeta = k.bn_relu_max_pool_backward(dout, argmax, a, spec.window, context)
        if spec.group is not None and needs[0]:
            sums = sync.gradient_sums(dgamma, dbeta, invstd, count, spec.group)
            dz = sync.completed(k, dz, a.z, mean, scale, *sums)
        dx = None
        if needs[0]:
            dx = (k.bn_dgrad(dz) if isinstance(dz, BNGrad) else dz).contiguous(memory_format=spec.out_layout)
    dgamma, dbeta = (None if p is None else d.to(p.dtype) for d, p in ((dgamma, t.gamma), (dbeta, t.beta)))
    return dx, None, None, None, None, dgamma, dbeta, None, None


DIRECT = Steps(forward, backward, branches.update_running)
