"""Eager blocks through torch's own autograd: the independent oracle. Imports torch alone; used by tests and tools."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def norm(z: Tensor, bn, training_buffers: bool = True) -> Tensor:
    """BatchNorm. `bn` has the fields of `functional.BN`; running buffers are updated in place unless training_buffers
    is False."""
    mean, var = bn.running_mean, bn.running_var
    batch = bn.training or mean is None
    momentum = bn.momentum
    if bn.training and bn.num_batches_tracked is not None and training_buffers:
        bn.num_batches_tracked.add_(1)
        momentum = 1.0 / float(bn.num_batches_tracked) if momentum is None else momentum
    if batch and not (bn.training and training_buffers):
        mean = var = None
    return F.batch_norm(z, mean, var, bn.gamma, bn.beta, batch, 0.0 if momentum is None else momentum, bn.eps)


def conv(x: Tensor, c) -> Tensor:
    return F.conv2d(x, c.weight, c.bias, c.stride, c.padding, c.dilation, c.groups)


def conv_bn(x: Tensor, c, training_buffers: bool = True) -> Tensor:
    """BatchNorm of the convolution. `c` has the fields of `functional.ConvBN`, or of `Conv`, which has no BatchNorm."""
    z = conv(x, c)
    return norm(z, c, training_buffers) if hasattr(c, "gamma") else z


def bottleneck(x: Tensor, conv1, conv2, conv3, shortcut=None) -> Tensor:
    """The block of `functional.bottleneck`, operation by operation."""
    y = F.relu(conv_bn(x, conv1))
    y = F.relu(conv_bn(y, conv2))
    return F.relu(conv_bn(y, conv3) + (x if shortcut is None else conv_bn(x, shortcut)))


def block(
    x, *convs, bn=None, shortcut=None, relu=True, scale=1.0, row_scale=None, gate=None
) -> Tensor:
    """`functional.conv_bn_relu`, `conv_bn_add_relu` and, with a bn before, `preactivation`, operation by operation.

    x: a tensor or several; shortcut as there, "none" for none.
    """
    x = torch.cat(list(x), 1) if isinstance(x, (list, tuple)) else x
    first = x if bn is None else F.relu(norm(x, bn))
    main = conv_bn(first, convs[0])
    for before, c in zip(convs, convs[1:], strict=False):
        main = conv_bn(activated(main, before), c)
    if row_scale is not None:
        main = main * row_scale.to(main.dtype)[:, None, None, None]
    residual = _shortcut(shortcut, x, first)
    if residual is not None:
        main = main + residual if gate is None else gate * main + (1 - gate) * residual
    out = main * scale
    return activated(out, convs[-1]) if relu else out


def activated(v: Tensor, c) -> Tensor:
    """What follows a `functional.ConvBN`."""
    act = getattr(c, "act", None)
    if act is None:
        return F.relu(v)
    return F.leaky_relu(v, act.slope) if act.kind == "leaky_relu" else getattr(F, act.kind)(v)


def bn_relu(x: Tensor, bn, pool=None) -> Tensor:
    """`functional.bn_relu`, operation by operation."""
    y = F.relu(norm(x, bn))
    return y if pool is None else F.max_pool2d(y, *pool)


def _shortcut(shortcut, x: Tensor, first: Tensor) -> Tensor | None:
    if shortcut is None or isinstance(shortcut, Tensor):
        return x if shortcut is None else shortcut
    if isinstance(shortcut, str):
        return None
    if hasattr(shortcut, "before"):
        rows, columns = shortcut.stride
        after = shortcut.channels - shortcut.before - x.shape[1]
        return F.pad(x[:, :, ::rows, ::columns], (0, 0, 0, 0, shortcut.before, after))
    if hasattr(shortcut, "window"):
        size, stride, padding, _, ceil_mode = shortcut.window
        first = F.avg_pool2d(first, size, stride, padding, ceil_mode, shortcut.count_include_pad)
        return conv_bn(first, shortcut.conv)
    return conv_bn(first, shortcut)
