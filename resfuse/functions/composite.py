"""The blocks in differentiable torch operations: what backward computes through when its own graph is wanted.

Slow and memory-hungry, and right to any order; used for double backward only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .unit import Tensors, Unit


def conv_bn(x: Tensor, unit: Unit, t: Tensors) -> Tensor:
    bias = None if t.bias is None else t.bias.to(x.dtype)
    z = F.conv2d(x, t.weight.to(x.dtype), bias, *unit.geometry)
    return F.batch_norm(z, t.mean, t.var, t.gamma, t.beta, unit.batch, 0.0, unit.eps)


def bottleneck(x: Tensor, units: tuple[Unit, ...], tensors: tuple[Tensors, ...]) -> Tensor:
    conv1, conv2, conv3, *projection = zip(units, tensors, strict=True)
    y = F.relu(conv_bn(x, *conv1))
    y = F.relu(conv_bn(y, *conv2))
    return F.relu(conv_bn(y, *conv3) + (conv_bn(x, *projection[0]) if projection else x))


def differentiable_gradients(out: Tensor, dout: Tensor, inputs: list[Tensor | None]) -> list[Tensor | None]:
    """Gradients of out in the inputs that require one, connected to out's inputs and to dout."""
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, dout, create_graph=True, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]
