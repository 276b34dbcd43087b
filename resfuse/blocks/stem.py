"""torchvision's ResNet: its stem, BatchNorm, ReLU and max pool in one; the rest of its forward as it is."""

from __future__ import annotations

import torch
from torch import nn

from .. import functional
from ..kernels.interface import Reason, Window
from ._pool import pool_refusal, window
from .mixin import conv_refusal, export, norm_refusal, plain_refusal, read_conv, read_norm

ORIGINALS = ("torchvision.models.resnet.ResNet",)
LISTS = False
OWNS = ("conv1", "bn1", "relu", "maxpool")  # the layers are blocks of their own


def refusal(model: nn.Module) -> Reason | None:
    """Why the model, as it is now, must run its original forward."""
    if "_forward_impl" in model.__dict__:
        return Reason("own_forward", "the model has a _forward_impl of its own")
    return stem_refusal(model)


def stem_refusal(model: nn.Module) -> Reason | None:
    """Why what follows the first convolution is more, or less, than the forwards of its classes."""
    return (
        norm_refusal("bn1", model.bn1)
        or plain_refusal("relu", model.relu, nn.ReLU)
        or pool_refusal("maxpool", model.maxpool)
    )


def convolved(
    x: torch.Tensor, block: nn.Module, conv: nn.Module, bn: nn.Module, pool: Window | None, backend: str
) -> torch.Tensor:
    """The stem. Its convolution is not called but read, if it is no more than that, where memory is leanest and where
    the kernel set has one of its own."""
    norm = read_norm(bn)
    if conv_refusal("conv", conv) is not None:
        return functional.bn_relu(conv(x), norm, pool, backend=backend)
    if block.resfuse_state.memory == "leanest":
        return functional.stem(x, read_conv(conv), norm, pool, backend=backend)
    z, stats = functional.image_conv(x, read_conv(conv), norm.batch, backend=backend) or (conv(x), None)
    return functional.bn_relu(z, norm, pool, stats=stats, backend=backend)


def run(model: nn.Module, x: torch.Tensor, backend: str) -> torch.Tensor:
    x = convolved(x, model, model.conv1, model.bn1, window(model.maxpool), backend)
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = layer(x)
    return model.fc(torch.flatten(model.avgpool(x), 1))


def stem_ends(_: nn.Module) -> tuple[str, str]:
    """The names of the stem's convolution and of its last module."""
    return "conv1", "maxpool"


def forms(model: nn.Module) -> str:
    return "stem: bn1 and relu in one" + ("" if window(model.maxpool) is None else ", with maxpool by 8-bit places")


def __getattr__(name: str) -> type[nn.Module]:
    return export(name, __name__, ORIGINALS)
