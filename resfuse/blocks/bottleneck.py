"""torchvision's Bottleneck (ResNet-50 and deeper, ResNeXt, Wide ResNet, v1 and v1.5), fused."""

from __future__ import annotations

import sys

import torch
from torch import nn

from .. import functional
from ..functional import ConvBN
from ..kernels.interface import Reason
from .mixin import Pair, fused_class, pair_refusal, read_pair, wrapped

TORCHVISION = "torchvision.models.resnet.Bottleneck"
PAIRS = (Pair("conv1", "bn1"), Pair("conv2", "bn2"), Pair("conv3", "bn3"))
SHORTCUT = Pair("downsample.0", "downsample.1")


def refusal(block: nn.Module) -> Reason | None:
    """Why the block, as it is now, must run its original forward."""
    downsample = block.downsample
    if downsample is not None:
        if type(downsample) is not nn.Sequential or len(downsample) != 2:
            return Reason("downsample", "downsample is not nn.Sequential(Conv2d, BatchNorm2d)")
        reason = wrapped("downsample", downsample)
        if reason:
            return reason
    if type(block.relu) is not nn.ReLU:
        return Reason("module_type", f"relu is a {type(block.relu).__name__}, not nn.ReLU")
    norms = [pair.modules(block)[1] for pair in _pairs(block)]
    if len(set(map(id, norms))) < len(norms):
        return Reason("shared_norm", "one BatchNorm serves two convolutions, and would be updated once")
    for reason in (wrapped("relu", block.relu), *(pair_refusal(block, pair) for pair in _pairs(block))):
        if reason:
            return reason
    return None


def convs(block: nn.Module) -> tuple[ConvBN, ...]:
    """conv1, conv2, conv3 and the projection shortcut's, where there is one."""
    return tuple(read_pair(block, pair) for pair in _pairs(block))


def run(block: nn.Module, x: torch.Tensor, backend: str) -> torch.Tensor:
    return functional.bottleneck(x, *convs(block), backend=backend)


def forms(block: nn.Module) -> str:
    """How the wide products are made, for `explain`: rows are N*H*W of the block's output."""
    names = ("conv3", "downsample")
    text = []
    for name, rows in zip(names, functional.covariance_from(convs(block))[2:], strict=False):
        text.append(f"{name} recomputed" if rows is None else f"{name} covariance from {rows} rows")
    return ", ".join(text)


def _pairs(block: nn.Module) -> tuple[Pair, ...]:
    return PAIRS if block.downsample is None else (*PAIRS, SHORTCUT)


def __getattr__(name: str):
    if name == "Bottleneck":
        from torchvision.models.resnet import Bottleneck

        return fused_class(Bottleneck, sys.modules[__name__])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
