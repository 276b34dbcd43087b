"""The convolution of an image's few channels, a network's first, by a kernel set that has one of its own, with the
statistics of what it writes: `bn_relu.py` goes on from both.

    z = conv(x)    mean, var = of z        kept for backward: x and, by the next Function, z
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import dispatch
from ..kernels.interface import Geometry
from . import replay


class ImageSpec(NamedTuple):
    """What is static in one call; stats: whether the statistics of z are wanted."""

    geometry: Geometry
    stats: bool
    backend: str


class ImageFunction(torch.autograd.Function):
    """apply(spec, x, weight) -> (z, mean, var), the latter without gradients, or None.

    x is in storage dtype; weight may be of another (autocast): it is cast, and its gradient is not.
    """

    @staticmethod
    def forward(ctx, spec: ImageSpec, x: Tensor, weight: Tensor):
        def call():
            with torch.autocast(x.device.type, enabled=False):
                return k.conv_stats(x, weight.to(x.dtype), spec.geometry, spec.stats)

        k = dispatch.kernels(spec.backend, x.device.type, x.dtype)
        z, stats = replay.run(k, "image", None, [x, weight], call, spec)
        ctx.spec = spec
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        if stats is None:
            return z, None, None
        ctx.mark_non_differentiable(*stats)
        return z, *stats

    @staticmethod
    def backward(ctx, dz: Tensor | None, *_):
        spec, (x, weight), needs = ctx.spec, ctx.saved_tensors, ctx.needs_input_grad[1:]
        if dz is None:
            return None, None, None
        if torch.is_grad_enabled():  # create_graph: these gradients will be differentiated
            with torch.autocast(x.device.type, enabled=False):
                found = _composite(dz, x, weight.to(x.dtype), spec.geometry, needs)
        else:
            def call():
                with torch.autocast(x.device.type, enabled=False):
                    return k.conv_backward(dz, x, weight.to(x.dtype), spec.geometry, None, needs)

            dz = dz.contiguous(memory_format=torch.channels_last)
            k = dispatch.kernels(spec.backend, x.device.type, x.dtype)
            found = replay.run(k, "image_backward", None, [dz, x, weight], call, spec, needs)
        dx, dweight = found
        return None, dx, None if dweight is None else dweight.to(weight.dtype)


def _composite(
    dz: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """By torch's convolution, which is differentiable."""
    stride, padding, dilation, groups = geometry
    return torch.ops.aten.convolution_backward(
        dz, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [*needs, False]
    )[:2]
