"""timm's split attention (ResNeSt): its wide convolution, BatchNorm and activation in one.

    y = act(bn(conv(x))), in `radix` parts;  out = sum over parts of y times its weight,
    the weights a softmax over parts (of one, a sigmoid), for each channel, of two convolutions of the parts' sum,
    averaged over pixels
"""

from __future__ import annotations

from torch import Tensor, nn

from ..kernels.interface import Reason
from . import _segments
from ._segments import Step
from .mixin import SOME

ORIGINALS = ("timm.layers.split_attn.SplitAttn",)
LISTS = False
OWNS = SOME


def find(block: nn.Module) -> Step:
    return _segments.step(block.conv, block.bn0, block.drop, block.act0)


def refusal(block: nn.Module) -> Reason | None:
    """Why the block, as it is now, must run its original forward."""
    return _segments.refusal(block, [find(block)])


def owned(block: nn.Module) -> list[nn.Module]:
    return list(_segments.bypassed([find(block)]))


def watched(block: nn.Module) -> list[nn.Module]:
    """Everything that `find` looks at."""
    found = [block.conv, block.bn0, block.drop, block.act0]
    return [*found, *(inner for module in found for inner in module._modules.values())]


def run(block: nn.Module, x: Tensor, backend: str) -> Tensor:
    step = find(block)
    _segments.check_proven([step], x, backend)
    y = _segments.run(_segments.segments([step]), x, block)
    n, c, h, w = y.shape
    parts = y.view(n, block.radix, c // block.radix, h, w)
    gap = parts.sum(1).mean((2, 3), keepdim=True)
    weight = block.rsoftmax(block.fc2(block.act1(block.bn1(block.fc1(gap)))))
    return (parts * weight.view(n, block.radix, c // block.radix, 1, 1)).sum(1)


def forms(block: nn.Module) -> str:
    return "its convolution and BatchNorm; the attention as it is"
