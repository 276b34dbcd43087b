"""Convolutions, BatchNorms and activations in a row, as modules, cut into what runs fused and what is called.

A chain in one Function has activations between its convolutions. Where something else follows one (attention,
anti-aliasing, another activation, nothing), the chain ends there, the module is called, and another chain begins. A
chain of one keeps as much as the modules where its activation is ReLU, and makes fewer passes over it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..arguments import ArgumentError
from ..functions.composite import activated
from ..kernels import measured
from ..kernels.interface import Activation, Reason
from .mixin import (
    FusedMixin,
    Unproven,
    calls_norm,
    conv_refusal,
    has_activation,
    norm_kind,
    norm_refusal,
    pads_same,
    read_modules,
    wrapped,
)

FUSED = {  # what the kernels have, besides ReLU
    nn.LeakyReLU: "leaky_relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish",
}  # fmt: skip
CONTAINERS = (
    "torch.nn.modules.container.Sequential", "torchvision.ops.misc.Conv2dNormActivation",
    "torchvision.models.regnet.SimpleStemIN", "torchvision.models.segmentation.fcn.FCNHead",
    "torchvision.models.segmentation.deeplabv3.ASPPConv", "torchvision.models.segmentation.deeplabv3.DeepLabHead",
    "timm.models.efficientformer.Stem4", "timm.models.starnet.ConvBN",
)  # fmt: skip


class Step(NamedTuple):
    """A convolution, its BatchNorm, and the modules after them in order; identities and what is None are left out."""

    conv: nn.Module
    norm: nn.Module
    after: tuple[nn.Module, ...] = ()


class Segment(NamedTuple):
    """A chain: convolutions, each with its BatchNorm and what follows that (None for ReLU), and whether something
    follows the last one; then called."""

    pairs: tuple[tuple[nn.Module, nn.Module, Activation | None], ...]
    ends: bool
    then: tuple[nn.Module, ...]


def step(conv: nn.Module, norm: nn.Module, *after: nn.Module | None) -> Step:
    """What is inside the BatchNorm (timm's BatchNormAct2d) comes before what is after it."""
    inside = (norm._modules.get("drop"), norm._modules.get("act"))
    return Step(conv, norm, tuple(m for m in (*inside, *after) if not does_nothing(m)))


def does_nothing(module: nn.Module | None) -> bool:
    """Whether there is nothing to call: no module, or an identity without hooks."""
    return module is None or (type(module) is nn.Identity and wrapped("identity", module) is None)


def flattened(container: nn.Module) -> Iterator[nn.Module]:
    """The modules of a Sequential, and of those inside it, in order."""
    for child in container._modules.values():
        if is_container(child):
            yield from flattened(child)
        elif not does_nothing(child):
            yield child


def is_container(module: nn.Module) -> bool:
    """Whether it calls its children in order."""
    return f"{type(module).__module__}.{type(module).__qualname__}" in CONTAINERS


def is_fused(module: nn.Module) -> bool:
    """Whether it is an activation that the kernels have."""
    return type(module) is nn.ReLU or type(module) in FUSED


def activation(module: nn.Module) -> Activation | None:
    """What the kernels call it; None for ReLU."""
    if type(module) is nn.ReLU:
        return None
    return Activation(FUSED[type(module)], getattr(module, "negative_slope", 0.0))


def segments(steps: Iterable[Step]) -> list[Segment]:
    found: list[Segment] = []
    for conv, norm, after in steps:
        ends = len(after) > 0 and is_fused(after[0])
        act = activation(after[0]) if ends else None
        joins = len(found) > 0 and found[-1].ends and len(found[-1].then) == 0 and not pads_same(conv)
        before = found.pop().pairs if joins else ()
        found.append(Segment((*before, (conv, norm, act)), ends, after[1:] if ends else after))
    return found


def refusal(block: nn.Module, steps: Iterable[Step]) -> Reason | None:
    """Why the steps cannot be read and run from outside their modules."""
    names, norms = {id(m): name for name, m in block.named_modules()}, set()
    for conv, norm, after in steps:
        reason = conv_refusal(names.get(id(conv), "conv"), conv, others=True)
        reason = reason or norm_refusal(names.get(id(norm), "norm"), norm, acts=True)
        if reason is None and after and is_fused(after[0]):
            reason = wrapped(names.get(id(after[0]), "activation"), after[0])
        if reason is None and id(norm) in norms:
            reason = Reason("shared_norm", "one BatchNorm serves two convolutions, and would be updated once")
        if reason is not None:
            return reason
        norms.add(id(norm))
    return None


def check_proven(steps: Iterable[Step], x: Tensor, backend: str) -> None:
    """Raises Unproven for what `unproven` says."""
    text = unproven(steps, x, backend)
    if text is not None:
        raise Unproven(text)


def unproven(steps: Iterable[Step], x: Tensor, backend: str) -> str | None:
    """Why the modules are better: `auto` would do an activation by the eager set, in more passes than they make."""
    if backend != "auto" or not x.is_cuda or not measured.newer("bn_act") or torch.compiler.is_compiling():
        return None
    names = [type(step.after[0]).__name__ for step in steps if step.after and type(step.after[0]) in FUSED]
    if not names:
        return None
    return f'the kernels of {names[0]} have passed their tests on no GPU yet; backend="triton" runs them'


def bypassed(steps: Iterable[Step]) -> Iterator[nn.Module]:
    """The modules whose forward the segments stand for."""
    for conv, norm, after in steps:
        yield from (conv, norm)
        if after and is_fused(after[0]):
            yield after[0]


def run(found: Iterable[Segment], x: Tensor, block: FusedMixin) -> Tensor:
    for segment in found:
        x = chain(segment, x, block)
        for module in segment.then:
            x = module(x)
    return x


def chain(segment: Segment, x: Tensor, block: FusedMixin) -> Tensor:
    def fused() -> Tensor:
        own = padded(segment.pairs[0][0], x)
        return functional.conv_bn_relu(own, *convs(segment), relu=segment.ends, backend=block.resfuse_state.backend)

    return attempt(block, fused, lambda: called(segment, x))


def attempt(block: FusedMixin, fused: Callable[[], Tensor], otherwise: Callable[[], Tensor]) -> Tensor:
    """fused(), one of several calls that stand for a forward; where its arguments do not fit, which shows before it has
    done anything, otherwise(): after other calls the original forward would do those again."""
    if torch.compiler.is_compiling():
        return fused()
    try:
        return fused()
    except ArgumentError as error:
        block.resfuse_state.count(Reason("argument", str(error)))
        return otherwise()


def called(segment: Segment, x: Tensor) -> Tensor:
    """The chain's modules, one after the other."""
    for i, (conv, norm, act) in enumerate(segment.pairs):
        z = nn.Conv2d.forward(conv, x) if calls_norm(conv) else conv(x)
        if has_activation(type(norm)):  # which is not of the chain where something lies between
            z = (nn.SyncBatchNorm if norm_kind(type(norm)) == "sync" else nn.BatchNorm2d).forward(norm, z)
        else:
            z = norm(z)
        x = activated(z, act) if segment.ends or i + 1 < len(segment.pairs) else z
    return x


def convs(segment: Segment) -> list[functional.ConvBN]:
    return [read_modules(*pair) for pair in segment.pairs]


def padded(conv: nn.Module, x: Tensor) -> Tensor:
    """x as a convolution with TensorFlow's "same" padding, which depends on sizes, wants it; it pads no more itself."""
    if not pads_same(conv):
        return x
    sides = []
    for size, k, stride, dilation in zip(x.shape[2:], conv.kernel_size, conv.stride, conv.dilation, strict=True):
        total = max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        sides.append((total // 2, total - total // 2))
    (top, bottom), (left, right) = sides
    return F.pad(x, (left, right, top, bottom)) if any(map(any, sides)) else x
