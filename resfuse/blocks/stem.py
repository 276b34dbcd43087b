"""torchvision's ResNet: its stem, BatchNorm, ReLU and max pool in one; the rest of its forward as it is."""

from __future__ import annotations

import torch
from torch import nn

from .. import functional
from ..kernels.interface import Reason
from ._pool import pool_refusal, window
from .mixin import export, norm_refusal, plain_refusal, read_norm

ORIGINALS = ("torchvision.models.resnet.ResNet",)
LISTS = False
OWNS = ("conv1", "bn1", "relu", "maxpool")  # the layers are blocks of their own


def refusal(model: nn.Module) -> Reason | None:
    """Why the model, as it is now, must run its original forward."""
    if "_forward_impl" in model.__dict__:
        return Reason("own_forward", "the model has a _forward_impl of its own")
    return (
        norm_refusal("bn1", model.bn1)
        or plain_refusal("relu", model.relu, nn.ReLU)
        or pool_refusal("maxpool", model.maxpool)
    )


def run(model: nn.Module, x: torch.Tensor, backend: str) -> torch.Tensor:
    x = functional.bn_relu(model.conv1(x), read_norm(model.bn1), window(model.maxpool), backend=backend)
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = layer(x)
    return model.fc(torch.flatten(model.avgpool(x), 1))


def forms(model: nn.Module) -> str:
    return "stem: bn1 and relu in one" + ("" if window(model.maxpool) is None else ", with maxpool by 8-bit places")


def __getattr__(name: str) -> type[nn.Module]:
    return export(name, __name__, ORIGINALS)
