"""Eager blocks through torch's own autograd: the independent oracle. Imports torch alone; used by tests and tools."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def conv_bn(x: Tensor, conv, training_buffers: bool = True) -> Tensor:
    """BatchNorm of the convolution. `conv` has the fields of `functional.ConvBN`; running buffers are updated in
    place unless training_buffers is False."""
    z = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    mean, var = conv.running_mean, conv.running_var
    batch = conv.training or mean is None
    momentum = conv.momentum
    if conv.training and conv.num_batches_tracked is not None and training_buffers:
        conv.num_batches_tracked.add_(1)
        momentum = 1.0 / float(conv.num_batches_tracked) if momentum is None else momentum
    if batch and not (conv.training and training_buffers):
        mean = var = None
    return F.batch_norm(z, mean, var, conv.gamma, conv.beta, batch, 0.0 if momentum is None else momentum, conv.eps)


def bottleneck(x: Tensor, conv1, conv2, conv3, shortcut=None) -> Tensor:
    """The block of `functional.bottleneck`, operation by operation."""
    y = F.relu(conv_bn(x, conv1))
    y = F.relu(conv_bn(y, conv2))
    return F.relu(conv_bn(y, conv3) + (x if shortcut is None else conv_bn(x, shortcut)))
