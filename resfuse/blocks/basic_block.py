"""torchvision's BasicBlock (ResNet-18 and 34), fused."""

from __future__ import annotations

import torch
from torch import nn

from .. import functional
from ..arguments import ConvBN
from ..kernels.interface import Reason
from . import _post_activation
from .mixin import Pair, export

ORIGINALS = ("torchvision.models.resnet.BasicBlock",)
LISTS = False  # of tensors side by side as input
OWNS = None  # every child
PAIRS = (Pair("conv1", "bn1"), Pair("conv2", "bn2"))


def refusal(block: nn.Module) -> Reason | None:
    return _post_activation.refusal(block, PAIRS)


def convs(block: nn.Module) -> tuple[ConvBN, ...]:
    """conv1, conv2 and the projection shortcut's, where there is one."""
    return _post_activation.convs(block, PAIRS)


def run(block: nn.Module, x: torch.Tensor, backend: str) -> torch.Tensor:
    return functional.basic_block(x, *convs(block), backend=backend)


def forms(block: nn.Module) -> str:
    return _post_activation.describe(block, PAIRS)


def __getattr__(name: str) -> type[nn.Module]:
    return export(name, __name__, ORIGINALS)
