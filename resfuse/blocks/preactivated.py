"""Blocks of other libraries with BatchNorm and ReLU before each convolution: dense layers, transitions, ResNet v2.

    first = relu(bn(x));  y = its convolution, and so on through the pairs
    out = pool(dropout(y))     or     drop_path(y) + shortcut, which is x, or a convolution of `first`
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..functional import Pooled
from ..kernels.interface import Reason
from . import _stats
from ._drop_path import drops_rows, row_scale
from ._pool import average_window, is_plain_average
from .mixin import (
    conv_refusal,
    export,
    norm_refusal,
    original_name,
    plain_refusal,
    read_conv,
    read_modules,
    read_norm,
    wrapped,
)

LISTS = True
OWNS = None


class Described(NamedTuple):
    """The names of its BatchNorms and convolutions, and of the ReLUs between those, where they are not inside the
    BatchNorms. adds: whether it has a shortcut; then `downsample`, absent or None for x itself, and `drop_path`. Else
    `drop_rate` may be a share of the output that is dropped, and `pool` a module to call."""

    norms: tuple[str, ...]
    convs: tuple[str, ...]
    relus: tuple[str, ...] = ()
    adds: bool = False


def numbered(*kinds: str, count: int) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(f"{kind}{i}" for i in range(1, count + 1)) for kind in kinds)


BLOCKS = {
    "torchvision.models.densenet._DenseLayer": Described(*numbered("norm", "conv", "relu", count=2)),
    "torchvision.models.densenet._Transition": Described(("norm",), ("conv",), ("relu",)),
    "timm.models.densenet.DenseLayer": Described(*numbered("norm", "conv", count=2)),
    "timm.models.densenet.DenseTransition": Described(("norm",), ("conv",)),
    "timm.models.dpn.BnActConv2d": Described(("bn",), ("conv",)),
    "timm.models.resnetv2.PreActBasic": Described(*numbered("norm", "conv", count=2), adds=True),
    "timm.models.resnetv2.PreActBottleneck": Described(*numbered("norm", "conv", count=3), adds=True),
}
ORIGINALS = tuple(BLOCKS)


def refusal(block: nn.Module) -> Reason | None:
    """Why the block, as it is now, must run its original forward."""
    described, children = BLOCKS[original_name(block)], block._modules
    required = [*chain.from_iterable(zip_longest(described.norms, described.relus, described.convs))]
    required = [name for name in required if name is not None]
    others = ("downsample", "drop_path") if described.adds else ("pool",)
    if [name for name in children if name not in others] != required or "pool" in [*children][:-1]:
        return Reason("children", f"children are {', '.join(children)}, not {', '.join(required)}")
    norms = [children[name] for name in described.norms]
    if len(set(map(id, norms))) < len(norms):
        return Reason("shared_norm", "one BatchNorm serves twice, and would be updated once")
    for name, norm in zip(described.norms, norms, strict=True):
        reason = norm_refusal(name, norm, acts=not described.relus)
        if reason is None and not described.relus:
            reason = _inside_refusal(name, norm)
        if reason:
            return reason
    reasons = [conv_refusal(name, children[name]) for name in described.convs]
    reasons += [plain_refusal(name, children[name], nn.ReLU) for name in described.relus]
    if described.adds:
        reasons.append(_shortcut_refusal(block))
    return next(filter(None, reasons), None)


def _inside_refusal(name: str, norm: nn.Module) -> Reason | None:
    """Why what is inside a BatchNorm is not just ReLU."""
    if "act" not in norm._modules:
        return Reason("module_type", f"{name} is a {type(norm).__name__}, with no ReLU after it")
    drop = plain_refusal(f"{name}.drop", norm.drop, nn.Identity)
    return drop or plain_refusal(f"{name}.act", norm.act, nn.ReLU)


def _shortcut_refusal(block: nn.Module) -> Reason | None:
    drop_path, shortcut = block.drop_path, block.downsample
    if not drops_rows(drop_path):
        reason = plain_refusal("drop_path", drop_path, nn.Identity)
        if reason:
            return reason
    if shortcut is None:
        return None
    conv, norm, pool = (shortcut._modules.get(name) for name in ("conv", "norm", "pool"))
    reason = wrapped("downsample", shortcut) or conv_refusal("downsample.conv", conv)
    reason = reason or plain_refusal("downsample.norm", norm, nn.Identity)
    if reason is None and not (pool is None or type(pool) is nn.Identity or is_plain_average(pool)):
        reason = Reason("downsample", f"downsample.pool is a {type(pool).__name__}, not a plain nn.AvgPool2d")
    return reason


def run(block: nn.Module, x: Tensor | Sequence[Tensor], backend: str) -> Tensor:
    """A dense layer's memory_efficient, a checkpoint of its first half, is moot: as little is kept without recomputing
    a convolution, and the first BatchNorm's statistics are updated once a step, not twice."""
    described, children = BLOCKS[original_name(block)], block._modules
    norms, modules = ([children[name] for name in names] for names in (described.norms, described.convs))
    pairs = [read_modules(conv, norm) for conv, norm in zip(modules[:-1], norms[1:], strict=True)]
    bn, convs = read_norm(norms[0]), (*pairs, read_conv(modules[-1]))
    if not described.adds:
        out = functional.preactivation(x, bn, *convs, backend=backend)
        drop_rate = getattr(block, "drop_rate", 0)
        out = F.dropout(out, drop_rate, block.training) if drop_rate > 0 else out
        return children["pool"](out) if "pool" in children else out
    rows = row_scale(block.drop_path, x, modules[-1].weight) if drops_rows(block.drop_path) else None
    hand_on = bn.training and _stats.can_carry()
    found = functional.preactivation(
        x, bn, *convs, shortcut=_shortcut(block.downsample), row_scale=rows, stats=_stats.take(x), want_stats=hand_on,
        backend=backend,
    )
    return _stats.leave(*found) if hand_on else found


def _shortcut(module: nn.Module | None):
    if module is None:
        return None
    conv, pool = read_conv(module.conv), module._modules.get("pool")
    if type(pool) is nn.AvgPool2d:
        return Pooled(conv, average_window(pool), pool.count_include_pad)
    return conv


def forms(block: nn.Module) -> str:
    *first, last = BLOCKS[original_name(block)].convs
    return ", ".join((*(f"{name} keep" for name in first), f"{last} linear"))


def __getattr__(name: str) -> type[nn.Module]:
    return export(name, __name__, ORIGINALS)
