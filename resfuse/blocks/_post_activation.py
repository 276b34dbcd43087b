"""What the plans of torchvision's post-activation blocks share: convolution-BatchNorm pairs, one ReLU, `downsample`."""

from __future__ import annotations

from torch import nn

from .. import functional
from ..arguments import ConvBN
from ..kernels.interface import Reason
from .mixin import Pair, pair_refusal, plain_refusal, read_pair, wrapped

SHORTCUT = Pair("downsample.0", "downsample.1")


def pairs_of(block: nn.Module, main: tuple[Pair, ...]) -> tuple[Pair, ...]:
    """The main branch's pairs and the projection's, where there is one."""
    return main if block.downsample is None else (*main, SHORTCUT)


def refusal(block: nn.Module, main: tuple[Pair, ...]) -> Reason | None:
    """Why the block, as it is now, must run its original forward."""
    downsample = block.downsample
    if downsample is not None:
        if type(downsample) is not nn.Sequential or len(downsample) != 2:
            return Reason("downsample", "downsample is not nn.Sequential(Conv2d, BatchNorm2d)")
        reason = wrapped("downsample", downsample)
        if reason:
            return reason
    pairs = pairs_of(block, main)
    norms = [pair.modules(block)[1] for pair in pairs]
    if len(set(map(id, norms))) < len(norms):
        return Reason("shared_norm", "one BatchNorm serves two convolutions, and would be updated once")
    for reason in (plain_refusal("relu", block.relu, nn.ReLU), *(pair_refusal(block, pair) for pair in pairs)):
        if reason:
            return reason
    return None


def convs(block: nn.Module, main: tuple[Pair, ...]) -> tuple[ConvBN, ...]:
    return tuple(read_pair(block, pair) for pair in pairs_of(block, main))


def describe(block: nn.Module, main: tuple[Pair, ...]) -> str:
    """How the outer products are made, for `explain`: rows are N*H*W of the block's output."""
    found = convs(block, main)
    projection = found[len(main)] if len(found) > len(main) else None
    names = (main[-1].conv, "downsample")
    text = []
    for name, form in zip(names, functional.forms(found[: len(main)], projection)[len(main) - 1 :], strict=False):
        text.append(f"{name} {form}")
    return ", ".join(text)

