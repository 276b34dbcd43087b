"""Our ConvBNReLU, fused: of several tensors side by side the concatenation is not kept."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional
from ..kernels.interface import Reason
from . import modules
from .mixin import Pair, export, pair_refusal, read_pair

ORIGINALS = ("resfuse.blocks.modules.ConvBNReLU",)
LISTS = True
OWNS = None
PAIR = Pair("conv", "bn")


def refusal(block: modules.ConvBNReLU) -> Reason | None:
    return pair_refusal(block, PAIR)


def run(block: modules.ConvBNReLU, x: Tensor | list[Tensor], backend: str) -> Tensor:
    return functional.conv_bn_relu(x, read_pair(block, PAIR), relu=block.relu, backend=backend)


def forms(block: modules.ConvBNReLU) -> str:
    return f"conv {functional.forms([read_pair(block, PAIR)], None)[0]}"


def __getattr__(name: str) -> type[nn.Module]:
    return export(name, __name__, ORIGINALS)
