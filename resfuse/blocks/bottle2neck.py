"""timm's Res2Net blocks: convolutions in a row, each on its own channels and the output before it, not concatenated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional
from ..kernels.interface import Reason
from . import _segments
from ._segments import Segment
from .mixin import conv_refusal, norm_kind, norm_refusal, plain_refusal, read_modules

ORIGINALS = ("timm.models.res2net.Bottle2neck", "timm.models.dla.DlaBottle2neck")
LISTS = False
OWNS = ("conv1", "bn1", "convs", "bns", "conv3", "bn3", "relu")


def refusal(block: nn.Module) -> Reason | None:
    """Why the block, as it is now, must run its original forward."""
    pairs = _pairs(block)
    for name, (conv, norm) in pairs.items():
        reason = conv_refusal(f"{name}'s convolution", conv) or norm_refusal(f"{name}'s BatchNorm", norm)
        if reason:
            return reason
        if norm_kind(type(norm)) == "sync":  # another process may run the original forward, of an empty batch
            return Reason("sync_order", "its SyncBatchNorms would meet in another order than in the original forward")
    if len({id(norm) for _, norm in pairs.values()}) < len(pairs):
        return Reason("shared_norm", "one BatchNorm serves two convolutions, and would be updated once")
    return plain_refusal("relu", block.relu, nn.ReLU)


def run(block: nn.Module, x: Tensor, backend: str, shortcut: Tensor | None = None, *_) -> Tensor:
    first, *middle, last = _pairs(block).values()
    parts = torch.split(_segments.chain(_rectified(first), x, block), block.width, 1)
    outputs, sums = [], not block.is_first
    for i, pair in enumerate(middle):
        source = parts[i] + outputs[-1] if sums and i > 0 else parts[i]
        outputs.append(_segments.chain(_rectified(pair), source, block))
    if block.scale > 1:
        outputs.append(parts[-1] if block.pool is None else block.pool(parts[-1]))
    if shortcut is None:
        downsample = getattr(block, "downsample", None)
        shortcut = x if downsample is None else downsample(x)
    attention, conv = getattr(block, "se", None), read_modules(*last)

    def fused() -> Tensor:
        if attention is None:
            return functional.conv_bn_add_relu(outputs, conv, shortcut=shortcut, backend=backend)
        return torch.relu(attention(functional.conv_bn_relu(outputs, conv, relu=False, backend=backend)) + shortcut)

    def called() -> Tensor:
        out = _segments.called(Segment(((*last, None),), False, ()), torch.cat(outputs, 1))
        return torch.relu((out if attention is None else attention(out)) + shortcut)

    return _segments.attempt(block, fused, called)


def _rectified(pair: tuple[nn.Module, nn.Module]) -> Segment:
    return Segment(((*pair, None),), True, ())


def forms(block: nn.Module) -> str:
    return f"{len(_pairs(block))} convolutions, one by one"


def _pairs(block: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    inside = zip(block.convs, block.bns, strict=True)
    named = {f"number {i} of convs": pair for i, pair in enumerate(inside)}
    return {"conv1": (block.conv1, block.bn1), **named, "conv3": (block.conv3, block.bn3)}
