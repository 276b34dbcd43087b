"""torchvision's DenseNet transition: BN-ReLU-1x1, whose normalised input is not kept, and an average pool."""

from __future__ import annotations

import torch
from torch import nn

from .. import functional
from ..kernels.interface import Reason
from .mixin import conv_refusal, export, norm_refusal, plain_refusal, read_conv, read_norm

ORIGINALS = ("torchvision.models.densenet._Transition",)
LISTS = False
OWNS = None


def refusal(transition: nn.Module) -> Reason | None:
    """Why the transition, as it is now, must run its original forward."""
    if list(transition._modules) != ["norm", "relu", "conv", "pool"]:
        return Reason("children", f"children are {', '.join(transition._modules)}, not norm, relu, conv, pool")
    return (
        norm_refusal("norm", transition.norm)
        or plain_refusal("relu", transition.relu, nn.ReLU)
        or conv_refusal("conv", transition.conv)
    )


def run(transition: nn.Module, x: torch.Tensor, backend: str) -> torch.Tensor:
    norm, conv = read_norm(transition.norm), read_conv(transition.conv)
    return transition.pool(functional.preactivation(x, norm, conv, backend=backend))


def forms(transition: nn.Module) -> str:
    return "conv linear"


def __getattr__(name: str) -> type[nn.Module]:
    return export(name, __name__, ORIGINALS)
