"""torchvision's IntermediateLayerGetter around a ResNet, as its segmentation and detection models have it: the stem's
BatchNorm, ReLU and max pool in one, the layers called as they are."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from ..arguments import ArgumentError
from ..kernels.interface import Reason
from . import stem
from ._pool import window
from .mixin import export

ORIGINALS = ("torchvision.models._utils.IntermediateLayerGetter",)
LISTS = False
OWNS = stem.OWNS
stem_ends, forms = stem.stem_ends, stem.forms


def applies(block: nn.ModuleDict) -> bool:
    """Whether it begins with a ResNet's stem: nothing says so but the names, in their order."""
    return tuple(block._modules)[: len(OWNS)] == OWNS


def refusal(block: nn.ModuleDict) -> Reason | None:
    """Why it, as it is now, must run its original forward."""
    if not applies(block):
        return Reason("children", "it does not begin with " + ", ".join(OWNS))
    returned = _returned(block)
    return Reason("returned", returned) if returned else stem.stem_refusal(block)


def _returned(block: nn.ModuleDict) -> str | None:
    return next((f"the output of {name} is wanted" for name in OWNS if name in block.return_layers), None)


def run(block: nn.ModuleDict, x: Tensor, backend: str) -> OrderedDict[str, Tensor]:
    returned = _returned(block)  # the gate compares which dictionary it is, not what that says
    if returned:
        raise ArgumentError(returned)
    layers, found = dict(block._modules), OrderedDict()
    conv, bn, _, pool = (layers.pop(name) for name in OWNS)
    x = stem.convolved(x, block, conv, bn, window(pool), backend)
    for name, layer in layers.items():
        x = layer(x)
        if name in block.return_layers:
            found[block.return_layers[name]] = x
    return found


def __getattr__(name: str) -> type[nn.Module]:
    return export(name, __name__, ORIGINALS)
