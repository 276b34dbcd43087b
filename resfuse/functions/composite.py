"""The blocks in differentiable torch operations: what backward computes through when its own graph is wanted.

Slow and memory-hungry, and right to any order; used for double backward only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.interface import Activation, Window
from .branches import GIVEN, IDENTITY, NOTHING, PADDED, PROJECTION, Inputs, Spec
from .unit import Tensors, Unit


def norm(z: Tensor, unit: Unit, t: Tensors) -> Tensor:
    return F.batch_norm(z, t.mean, t.var, t.gamma, t.beta, unit.batch, 0.0, unit.eps)


def conv_bn(x: Tensor, unit: Unit, t: Tensors) -> Tensor:
    bias = None if t.bias is None else t.bias.to(x.dtype)
    z = F.conv2d(x, t.weight.to(x.dtype), bias, *unit.geometry)
    return z if unit.eps is None else norm(z, unit, t)


def activated(v: Tensor, act: Activation | None) -> Tensor:
    """None: ReLU."""
    if act is None:
        return F.relu(v)
    return F.leaky_relu(v, act.slope) if act.kind == "leaky_relu" else getattr(F, act.kind)(v)


def gradients(spec: Spec, inputs: Inputs, needs: Inputs, dout: Tensor, passes: Tensor | None) -> list[Tensor | None]:
    """What `block.BlockFunction.backward` returns, differentiable.

    passes: 1 where out's ReLU passed and 0 elsewhere, for a given residual that was not kept; else None.
    """
    found = input_gradients(lambda flat: block(spec, Inputs.arrange(spec, flat), passes), dout, inputs.flat())
    if spec.shortcut.kind == GIVEN and inputs.residual is None and needs.residual:
        dresidual = (dout if passes is None else torch.where(passes != 0, dout, 0)) * spec.scale
        found[spec.parts + Inputs.RESIDUAL] = dresidual
    return found


def block(spec: Spec, inputs: Inputs, passes: Tensor | None) -> Tensor:
    """The block's output; without a given residual that was not kept, and its ReLU by `passes`, where it is given."""
    x = inputs.parts[0] if len(inputs.parts) == 1 else torch.cat(inputs.parts, 1)
    first = x if spec.norm is None else F.relu(norm(x, spec.norm, inputs.norm[0]))
    main = first
    for i, (unit, t) in enumerate(zip(spec.units, inputs.units, strict=True)):
        main = conv_bn(main if i == 0 else activated(main, spec.units[i - 1].act), unit, t)
    if spec.units[-1].act is not None:
        main = activated(main, spec.units[-1].act)
    if inputs.row_scale is not None:
        main = main * inputs.row_scale.to(main.dtype)[:, None, None, None]
    residual = _residual(spec, inputs, x, first)
    if inputs.gate is not None:
        main, residual = main * inputs.gate, residual * (1 - inputs.gate)
    out = (main if residual is None else main + residual) * spec.scale
    if passes is not None:
        return torch.where(passes != 0, out, 0)
    return F.relu(out) if spec.relu else out


def bn_relu(x: Tensor, unit: Unit, t: Tensors, window: Window | None) -> Tensor:
    y = F.relu(norm(x, unit, t))
    return y if window is None else F.max_pool2d(y, *window)


def _residual(spec: Spec, inputs: Inputs, x: Tensor, first: Tensor) -> Tensor | None:
    shortcut = spec.shortcut
    if shortcut.kind == IDENTITY:
        return x
    if shortcut.kind == GIVEN:
        return inputs.residual
    if shortcut.kind == PADDED:
        rows, columns = shortcut.stride
        after = shortcut.channels - shortcut.before - x.shape[1]
        return F.pad(x[:, :, ::rows, ::columns], (0, 0, 0, 0, shortcut.before, after))
    if shortcut.kind == PROJECTION:
        if shortcut.window is not None:
            size, stride, padding, _, ceil_mode = shortcut.window
            first = F.avg_pool2d(first, size, stride, padding, ceil_mode, shortcut.count_include_pad)
        return conv_bn(first, shortcut.unit, inputs.shortcut[0])
    assert shortcut.kind == NOTHING
    return None


def input_gradients(
    function: Callable[[list[Tensor | None]], Tensor], dout: Tensor, inputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of function(inputs) in the inputs that require one, connected to the inputs and to dout.

    They are taken in aliases: an input may be made of another one, and what it passes on to that one is not ours.
    """
    aliases = [t.view_as(t) if t is not None and t.requires_grad else t for t in inputs]
    wanted = [t for t in aliases if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(function(aliases), wanted, dout, create_graph=True, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]
