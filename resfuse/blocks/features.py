"""timm's networks that hold their first and last convolutions themselves: those fused, the layers called as they are.

Of a max pool after the first, 8-bit places are kept and nothing before it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from .. import functional
from ..kernels.interface import Reason
from . import _segments
from ._pool import pool_refusal, window
from ._segments import Step
from .mixin import SOME, norm_refusal, original_class, original_name, plain_refusal, read_norm

LISTS = False
OWNS = SOME
METHOD = "forward_features"


class Described(NamedTuple):
    """Names of what is called, in order: a convolution, its BatchNorm and activation, a pool; the layers; a convolution
    and its BatchNorm. An activation may be inside the BatchNorm."""

    stem: tuple[str, str]
    layers: tuple[str, ...]
    act: str | None = None
    pool: str | None = None
    head: tuple[str, str] | None = None


STEM = ("conv_stem", "bn1")
BLOCKS = {
    "timm.models.resnet.ResNet": Described(
        ("conv1", "bn1"), tuple(f"layer{i}" for i in range(1, 5)), "act1", "maxpool"
    ),
    "timm.models.efficientnet.EfficientNet": Described(STEM, ("blocks",), head=("conv_head", "bn2")),
    "timm.models.mobilenetv3.MobileNetV3": Described(STEM, ("blocks",)),
    "timm.models.ghostnet.GhostNet": Described(STEM, ("blocks",), "act1"),
    "timm.models.repghost.RepGhostNet": Described(STEM, ("blocks",), "act1"),
}
ORIGINALS = tuple(BLOCKS)


class Found(NamedTuple):
    """stem: None where its convolution is several, or ReLU and a max pool follow, with which its BatchNorm goes."""

    stem: Step | None
    head: Step | None


def find(model: nn.Module) -> Found:
    described = BLOCKS[original_name(model)]
    names = (*described.stem, described.act) if described.act else described.stem
    stem, head = (cut and _segments.step(*(getattr(model, name) for name in cut)) for cut in (names, described.head))
    return Found(None if _pooled(model) else stem, head)


def _pooled(model: nn.Module) -> bool:
    """Whether the first convolution runs on its own, and BatchNorm, ReLU and perhaps a pool after it in one."""
    described = BLOCKS[original_name(model)]
    if described.pool is None:
        return False
    plain = type(getattr(model, described.stem[0])) is nn.Conv2d
    return not plain or type(getattr(model, described.pool)) is nn.MaxPool2d


def refusal(model: nn.Module) -> Reason | None:
    """Why `forward_features`, as it is now, must be the original."""
    if METHOD in model.__dict__:
        return Reason("own_forward", f"the model has a {METHOD} of its own")
    if model.grad_checkpointing:
        return Reason("checkpointing", "the model's own checkpoints are switched on")
    stem, head = find(model)
    reason = _segments.refusal(model, [step for step in (stem, head) if step is not None])
    if reason or stem is not None:
        return reason
    described = BLOCKS[original_name(model)]
    norm, act, pool = (getattr(model, name) for name in (described.stem[1], described.act, described.pool))
    reason = norm_refusal(described.stem[1], norm) or plain_refusal(described.act, act, nn.ReLU)
    if type(pool) in (nn.MaxPool2d, nn.Identity):
        reason = reason or pool_refusal(described.pool, pool)
    return reason


def owned(model: nn.Module) -> list[nn.Module]:
    stem, head = find(model)
    inside = list(_segments.bypassed(step for step in (stem, head) if step is not None))
    if stem is None:
        described = BLOCKS[original_name(model)]
        conv, pool = getattr(model, described.stem[0]), getattr(model, described.pool)
        inside += [getattr(model, described.stem[1]), getattr(model, described.act)]
        conv = next(reversed(conv._modules.values()), None) if original_class(type(conv)) is nn.Sequential else conv
        inside += [conv] if type(conv) is nn.Conv2d else []  # it is called, and its BatchNorm is the stem's
        inside += [pool] if type(pool) is nn.MaxPool2d else []
    return inside


def watched(model: nn.Module) -> list[nn.Module]:
    """Everything that `find` and `refusal` look at."""
    described = BLOCKS[original_name(model)]
    names = (*described.stem, *(described.head or ()), described.act, described.pool)
    found = [getattr(model, name) for name in names if name is not None]
    return [*found, *(inner for module in found for inner in module._modules.values())]


def run(model: nn.Module, x: Tensor, backend: str) -> Tensor:
    described, (stem, head) = BLOCKS[original_name(model)], find(model)
    _segments.check_proven([step for step in (stem, head) if step is not None], x, backend)
    if stem is not None:
        x = _segments.run(_segments.segments([stem]), x, model)
        x = x if described.pool is None else getattr(model, described.pool)(x)
    else:
        conv, norm, pool = (getattr(model, name) for name in (*described.stem, described.pool))
        fits, z, act = type(pool) in (nn.MaxPool2d, nn.Identity), conv(x), getattr(model, described.act)
        x = _segments.attempt(
            model,
            lambda: functional.bn_relu(z, read_norm(norm), window(pool) if fits else None, backend=backend),
            lambda: pool(act(norm(z))) if fits else act(norm(z)),
        )
        x = x if fits else pool(x)
    for name in described.layers:
        x = getattr(model, name)(x)
    return x if head is None else _segments.run(_segments.segments([head]), x, model)


def forms(model: nn.Module) -> str:
    stem, head = find(model)
    text = "stem" if stem is not None else "stem: its BatchNorm, ReLU and pool in one"
    return text if head is None else f"{text}, head"
