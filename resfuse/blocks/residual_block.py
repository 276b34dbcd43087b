"""Our ResidualBlock and the classes made from it, fused."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional
from ..functional import Block, Pooled, Window, ZeroPad
from ..kernels.interface import Reason
from . import _stats, modules
from .mixin import Pair, conv_refusal, export, norm_refusal, read_conv, read_norm, read_pair

ORIGINALS = ("resfuse.blocks.modules.ResidualBlock", "resfuse.blocks.modules.PreActBlock",
             "resfuse.blocks.modules.PreActBottleneck")
LISTS = False
OWNS = None
SHORTCUT = Pair("shortcut", "shortcut_bn")


def refusal(block: modules.ResidualBlock) -> Reason | None:
    """Why the block, as it is now, must run its original forward."""
    norms = []
    for name, module in block._modules.items():
        if name == "gate":
            continue  # called as a module
        norm = "bn" in name
        if norm:
            norms.append(id(module))
        reason = norm_refusal(name, module) if norm else conv_refusal(name, module)
        if reason:
            return reason
    if len(set(norms)) < len(norms):
        return Reason("shared_norm", "one BatchNorm serves twice, and would be updated once")
    return None


def run(block: modules.ResidualBlock, x: Tensor, backend: str) -> Tensor:
    convs, projection = _convs(block)
    shortcut = _shortcut(block, projection)
    row_scale, gate = block.row_scale(x), block.gate_of(x)
    weights = {} if shortcut == "none" else dict(scale=block.scale, row_scale=row_scale, gate=gate)
    if not block.preactivation:
        if shortcut == "none":
            return functional.conv_bn_relu(x, *convs, relu=block.relu, backend=backend)
        return functional.conv_bn_add_relu(
            x, *convs, shortcut=shortcut, relu=block.relu, **weights, backend=backend
        )
    bn = read_norm(block.bn1)
    hand_on = bn.training and _stats.can_carry()
    found = functional.preactivation(
        x, bn, *convs, shortcut=shortcut, **weights, stats=_stats.take(x), want_stats=hand_on, backend=backend
    )
    return _stats.leave(*found) if hand_on else found


def as_block(block: modules.ResidualBlock, x: Tensor) -> Block | Reason:
    """As a run has it."""
    if "gate" in block._modules:
        return Reason("gate", "its gate reads the block's input")
    if block.kind == "none":
        return Reason("no_shortcut", "it has no shortcut")
    convs, projection = _convs(block)
    block_of = Block(
        tuple(convs), _shortcut(block, projection), relu=block.relu, scale=block.scale, row_scale=block.row_scale(x)
    )
    if not block.preactivation:
        return block_of
    bn = read_norm(block.bn1)
    return block_of._replace(bn=bn, want_stats=bn.training and _stats.can_carry())


def forms(block: modules.ResidualBlock) -> str:
    convs, projection = _convs(block)
    found = functional.forms(convs, projection)
    text = f"conv{block.depth} {found[block.depth - 1]}"
    return text if projection is None else f"{text}, shortcut {found[-1]}"


def _convs(block: modules.ResidualBlock) -> tuple[list, functional.ConvBN | functional.Conv | None]:
    """The main branch and the projection, as `functional` takes them."""
    inner = block._modules
    if block.preactivation:
        convs = [read_pair(block, Pair(f"conv{i}", f"bn{i + 1}")) for i in range(1, block.depth)]
        convs.append(read_conv(inner[f"conv{block.depth}"]))
        return convs, (read_conv(inner["shortcut"]) if "shortcut" in inner else None)
    convs = [read_pair(block, Pair(f"conv{i}", f"bn{i}")) for i in range(1, block.depth + 1)]
    return convs, (read_pair(block, SHORTCUT) if "shortcut" in inner else None)


def _shortcut(block: modules.ResidualBlock, projection):
    if block.kind == "padded":
        before, channels = block.padding
        return ZeroPad(channels, before, (block.stride, block.stride))
    if block.kind == "pooled" and block.stride > 1:
        step = (block.stride, block.stride)
        return Pooled(projection, Window(step, step, ceil_mode=True), count_include_pad=False)
    return {"identity": None, "none": "none"}.get(block.kind, projection)


def __getattr__(name: str) -> type[nn.Module]:
    return export(name, __name__, ORIGINALS)
