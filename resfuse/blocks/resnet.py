"""torchvision's BasicBlock (ResNet-18 and 34) and Bottleneck (the deeper ones, ResNeXt, Wide ResNet; v1 and v1.5)."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional
from ..arguments import Block, ConvBN
from ..kernels.interface import Reason
from .mixin import Pair, export, original_class, pair_refusal, plain_refusal, read_pair, wrapped

ORIGINALS = ("torchvision.models.resnet.BasicBlock", "torchvision.models.resnet.Bottleneck")
LISTS = False  # of tensors side by side as input
OWNS = None  # every child
PAIRS = (Pair("conv1", "bn1"), Pair("conv2", "bn2"), Pair("conv3", "bn3"))
SHORTCUT = Pair("downsample.0", "downsample.1")


def refusal(block: nn.Module) -> Reason | None:
    """Why the block, as it is now, must run its original forward."""
    downsample = block.downsample
    if downsample is not None:
        if original_class(type(downsample)) is not nn.Sequential or len(downsample) != 2:
            return Reason("downsample", "downsample is not nn.Sequential(Conv2d, BatchNorm2d)")
        reason = wrapped("downsample", downsample)
        if reason:
            return reason
    pairs = _pairs(block)
    norms = [pair.modules(block)[1] for pair in pairs]
    if len(set(map(id, norms))) < len(norms):
        return Reason("shared_norm", "one BatchNorm serves two convolutions, and would be updated once")
    for reason in (plain_refusal("relu", block.relu, nn.ReLU), *(pair_refusal(block, pair) for pair in pairs)):
        if reason:
            return reason
    return None


def convs(block: nn.Module) -> tuple[ConvBN, ...]:
    """Those of the main branch and the projection's, where there is one."""
    return tuple(read_pair(block, pair) for pair in _pairs(block))


def run(block: nn.Module, x: Tensor, backend: str) -> Tensor:
    block_of = functional.bottleneck if "conv3" in block._modules else functional.basic_block
    return block_of(x, *convs(block), backend=backend)


def as_block(block: nn.Module, _: Tensor) -> Block:
    """As a run has it."""
    found = convs(block)
    return Block(found) if block.downsample is None else Block(found[:-1], found[-1])


def forms(block: nn.Module) -> str:
    """How the outer products are made: rows are N*H*W of the block's output."""
    found, projected = convs(block), block.downsample is not None
    main = found[:-1] if projected else found
    outer = functional.forms(main, found[-1] if projected else None)[len(main) - 1 :]
    return ", ".join(f"{name} {form}" for name, form in zip((f"conv{len(main)}", "downsample"), outer, strict=False))


def _pairs(block: nn.Module) -> tuple[Pair, ...]:
    main = PAIRS if "conv3" in block._modules else PAIRS[:2]
    return main if block.downsample is None else (*main, SHORTCUT)


def __getattr__(name: str) -> type[nn.Module]:
    return export(name, __name__, ORIGINALS)
