"""torchvision's DenseNet layer: BN-ReLU-1x1-BN-ReLU-3x3 on a list of features that are never concatenated to stay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .. import functional
from ..kernels.interface import Reason
from .mixin import (
    Pair,
    conv_refusal,
    export,
    norm_refusal,
    pair_refusal,
    plain_refusal,
    read_conv,
    read_norm,
    read_pair,
)

ORIGINALS = ("torchvision.models.densenet._DenseLayer",)
LISTS = True
OWNS = None
PAIR = Pair("conv1", "norm2")


def refusal(layer: nn.Module) -> Reason | None:
    """Why the layer, as it is now, must run its original forward."""
    if layer.norm1 is layer.norm2:
        return Reason("shared_norm", "one BatchNorm serves twice, and would be updated once")
    return (
        norm_refusal("norm1", layer.norm1)
        or pair_refusal(layer, PAIR)
        or conv_refusal("conv2", layer.conv2)
        or plain_refusal("relu1", layer.relu1, nn.ReLU)
        or plain_refusal("relu2", layer.relu2, nn.ReLU)
    )


def run(layer: nn.Module, features: torch.Tensor | Sequence[torch.Tensor], backend: str) -> torch.Tensor:
    """memory_efficient, a checkpoint of the first half, is moot: as little is kept without recomputing a convolution,
    and norm1's statistics are updated once a step, not twice."""
    out = functional.preactivation(
        features, read_norm(layer.norm1), read_pair(layer, PAIR), read_conv(layer.conv2), backend=backend
    )
    return nn.functional.dropout(out, layer.drop_rate, layer.training) if layer.drop_rate > 0 else out


def forms(layer: nn.Module) -> str:
    return "conv1 keep, conv2 linear"


def __getattr__(name: str) -> type[nn.Module]:
    return export(name, __name__, ORIGINALS)
