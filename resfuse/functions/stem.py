"""A convolution, BatchNorm, ReLU and max pool, of which the convolution's output is not kept, the largest tensor of a
ResNet: backward convolves the image again.

    z = conv(x)    out = `bn_relu.py` of z

The convolution is torch's own both times, and so is its gradient: the bits are those of `bn_relu.py` after torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.interface import Geometry
from . import composite, sync
from . import unit as units
from .bn_relu import PoolSpec
from .unit import Tensors


class StemSpec(NamedTuple):
    """What is static in one call."""

    pool: PoolSpec
    geometry: Geometry

    def composite(self, operands: Sequence[Tensor | None]) -> Tensor:
        z = convolved(*operands[:3], self.geometry)
        return composite.bn_relu(z, self.pool.unit, Tensors(*operands[3:]), self.pool.window)


class Operands(NamedTuple):
    """A convolution's, in the dtype in which it computes."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None


class StemFunction(torch.autograd.Function):
    """apply(spec, z, x, weight, bias, *the `Tensors` of the BatchNorm) -> out, where z is `convolved` of the operands.

    x is in storage dtype; weight and bias may be of another (autocast): they are cast, and their gradients are not.
    """

    @staticmethod
    def forward(ctx, spec: StemSpec, z: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *flat: Tensor | None):
        made, tensors = spec.pool.steps.forward(spec.pool, [z, None, None, *flat]), Tensors(*flat)
        spec.pool.pending.extend(units.running_updates([spec.pool.running], [made.stats], [tensors]))
        ctx.save_for_backward(x, weight, bias, *flat, *made.saved)
        ctx.spec = spec
        return made.out

    @staticmethod
    def backward(ctx, dout: Tensor):
        spec, (x, weight, bias, *rest) = ctx.spec, ctx.saved_tensors
        flat, saved = rest[: len(Tensors._fields)], rest[len(Tensors._fields) :]
        if torch.is_grad_enabled():  # create_graph: these gradients will be differentiated
            sync.check_first_order(spec.pool)
            with torch.autocast(x.device.type, enabled=False):
                return None, None, *composite.input_gradients(spec.composite, dout, [x, weight, bias, *flat])
        needs = ctx.needs_input_grad[2:5]
        z = convolved(x, weight, bias, spec.geometry)
        dz, _, _, *found = spec.pool.steps.backward(
            spec.pool, [z, None, None, *flat], saved, dout, [any(needs), False, False, *ctx.needs_input_grad[5:]]
        )
        del z
        if not any(needs):
            return None, None, None, None, None, *found
        a, (stride, padding, dilation, groups) = _operands(x, weight, bias), spec.geometry
        gradients = torch.ops.aten.convolution_backward(
            dz, a.x, a.weight, None if bias is None else list(bias.shape), stride, padding, dilation, False, [0, 0],
            groups, list(needs),
        )
        given = (x, weight, bias)
        cast = (None if not need else g.to(t.dtype) for g, t, need in zip(gradients, given, needs, strict=True))
        return None, None, *cast, *found


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """z [N, K, P, Q], as torch's convolution gives it under the autocast that x was cast for."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.conv2d(*_operands(x, weight, bias), *geometry)


def _operands(x: Tensor, weight: Tensor, bias: Tensor | None) -> Operands:
    return Operands(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
