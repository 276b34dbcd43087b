"""timm's DLA roots: a convolution of tensors side by side, the first of which may be added; never concatenated."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .. import functional
from ..kernels.interface import Reason
from .mixin import Pair, pair_refusal, plain_refusal, read_pair

ORIGINALS = ("timm.models.dla.DlaRoot",)
LISTS = True
OWNS = None
PAIR = Pair("conv", "bn")


def refusal(root: nn.Module) -> Reason | None:
    """Why it must, as it is now, run its original forward."""
    return pair_refusal(root, PAIR) or plain_refusal("relu", root.relu, nn.ReLU)


def run(root: nn.Module, x: Sequence[Tensor], backend: str) -> Tensor:
    conv = read_pair(root, PAIR)
    if not root.shortcut:
        return functional.conv_bn_relu(x, conv, backend=backend)
    return functional.conv_bn_add_relu(x, conv, shortcut=x[0], backend=backend)


def forms(root: nn.Module) -> str:
    return f"conv {functional.forms([read_pair(root, PAIR)], None)[0]}"
