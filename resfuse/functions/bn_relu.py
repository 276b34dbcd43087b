"""BatchNorm and ReLU without a convolution, with or without the max pool of a ResNet's stem.

    y = relu(scale * x + shift)    out = y, or the maxima of its windows

Kept for backward: x and, of a pool, one byte per maximum: y is made again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import dispatch
from ..kernels.interface import BNContext, BNGrad, Norm, RunningUpdate, Stats, Sum, Want, Window, wide
from . import composite
from . import unit as units
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


class BNReluFunction(torch.autograd.Function):
    """apply(spec, x, mean, var, *tensors) -> out; mean and var of x, or None; tensors: the `Tensors` of a BatchNorm."""

    @staticmethod
    def forward(ctx, spec: PoolSpec, x: Tensor, mean: Tensor | None, var: Tensor | None, *flat: Tensor | None):
        t = Tensors(*flat)
        k = dispatch.kernels(spec.backend, x.device.type, x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            xs = x.contiguous(memory_format=spec.layout)
            measured = None
            if spec.unit.batch:
                measured = k.bn_stats(xs) if mean is None else Stats(mean, var)
            kept = units.normalise(k, spec.unit, t, measured, wide(x.dtype))
            a, argmax = Norm(xs, kept.scale, kept.shift), None
            if spec.window is None:
                out = k.apply(a, Sum(), Want()).out
            else:
                out, argmax = k.bn_relu_max_pool(a, spec.window)
            out = out.contiguous(memory_format=spec.out_layout)
            spec.pending.extend(units.running_updates([spec.running], [measured], [t]))
        if spec.differentiable:
            ctx.save_for_backward(x, argmax, *flat, kept.mean, kept.invstd, kept.scale, kept.shift)
            ctx.spec, ctx.kernels = spec, k
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):
        spec, k = ctx.spec, ctx.kernels
        x, argmax, *flat, mean, invstd, scale, shift = ctx.saved_tensors
        t = Tensors(*flat)
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled():  # create_graph: these gradients will be differentiated
                out = composite.bn_relu(x, spec.unit, t, spec.window)
                dx, *rest = composite.input_gradients(out, dout, [x, *flat])
                return None, dx, None, None, *rest
            a = Norm(x.contiguous(memory_format=spec.layout), scale, shift)
            context = BNContext(mean, invstd, t.gamma, spec.unit.batch)
            dout = dout.contiguous(memory_format=spec.layout)
            if spec.window is None:
                dz, dgamma, dbeta = k.bn_backward(dout, k.prepare(a), a.z, context)
            else:
                dz, dgamma, dbeta = k.bn_relu_max_pool_backward(dout, argmax, a, spec.window, context)
            dx = None
            if ctx.needs_input_grad[1]:
                dx = (k.bn_dgrad(dz) if isinstance(dz, BNGrad) else dz).contiguous(memory_format=spec.out_layout)
        dgamma, dbeta = (
            None if p is None else d.to(p.dtype) for d, p in ((dgamma, t.gamma), (dbeta, t.beta))
        )
        return None, dx, None, None, None, None, dgamma, dbeta, None, None
