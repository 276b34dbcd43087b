"""Our Chain of ConvBNReLUs, fused: one Function from end to end."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional
from ..kernels.interface import Reason
from . import modules
from .mixin import Pair, export, original_class, pair_refusal, read_pair, wrapped

ORIGINALS = ("resfuse.blocks.modules.Chain",)
LISTS = True
OWNS = None


def refusal(chain: modules.Chain) -> Reason | None:
    """Why the chain, as it is now, must run its original forward."""
    layers = chain._modules
    if not layers:
        return Reason("children", "there is no layer")
    norms = set()
    for i, (name, layer) in enumerate(layers.items(), 1):
        if original_class(type(layer)) is not modules.ConvBNReLU:
            return Reason("module_type", f"{name} is a {type(layer).__name__}, not ConvBNReLU")
        if not layer.relu and i < len(layers):
            return Reason("children", f"{name} has no ReLU, and is not the last")
        reason = wrapped(name, layer) or pair_refusal(chain, _pair(name))
        if reason:
            return reason
        norms.add(id(layer.bn))
    if len(norms) < len(layers):
        return Reason("shared_norm", "one BatchNorm serves two convolutions, and would be updated once")
    return None


def run(chain: modules.Chain, x: Tensor | list[Tensor], backend: str) -> Tensor:
    *_, last = chain._modules.values()
    return functional.conv_bn_relu(x, *_convs(chain), relu=last.relu, backend=backend)


def forms(chain: modules.Chain) -> str:
    *_, last = functional.forms(_convs(chain), None)
    return f"last conv {last}"


def _convs(chain: modules.Chain) -> list[functional.ConvBN]:
    return [read_pair(chain, _pair(name)) for name in chain._modules]


def _pair(name: str) -> Pair:
    return Pair(f"{name}.conv", f"{name}.bn")


def __getattr__(name: str) -> type[nn.Module]:
    return export(name, __name__, ORIGINALS)
