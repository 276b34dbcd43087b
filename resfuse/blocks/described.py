"""Blocks of other libraries, each described by the names of its parts: a table, and what it means.

    y = x;  for each convolution: y = its modules(act(bn(conv(y))))
    out = activation(drop_path(attention(y)) + shortcut(x))

What the chain fuser cannot take into one Function (`_segments.py`) is called as a module between two chains. A lone
convolution, BatchNorm and ReLU is no block: nothing would be kept less, and a vendor's convolution is as fast.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from ..functional import Pooled, Window
from ..kernels.interface import Reason
from . import _segments
from ._segments import Segment, Step, does_nothing
from .mixin import SOME, norm_kind, plain_refusal, wrapped

LISTS = False
OWNS = SOME


class Part(NamedTuple):
    """A convolution: dotted names, inside the block, of it, of its BatchNorm, and of the modules called after that, in
    order. What is absent, None or an Identity is left out; a convolution then with all that belongs to it."""

    conv: str
    norm: str
    after: tuple[str, ...] = ()


class BlockDescription(NamedTuple):
    """A block by the names of its parts, whose forward is what this module's docstring says.

    row: in the place of parts, a Sequential of them, in which others may lie, and what is called between them.
    attention: modules on the last BatchNorm's output. shortcut: None where there is none; else a module on x, an
    identity where that is None (or, with none_adds_nothing, nothing). skips: an attribute that says whether x is added,
    in blocks without a module for it. activation: after the sum.
    """

    parts: tuple[Part, ...] = ()
    attention: tuple[str, ...] = ()
    drop_path: str | None = None
    shortcut: str | None = None
    none_adds_nothing: bool = False
    skips: str | None = None
    activation: str | None = None
    row: str | None = None


def wrapper(name: str, then: tuple[str, ...] = ()) -> Part:
    """A timm ConvNormAct, the activation of which is inside its BatchNorm."""
    return Part(f"{name}.conv", f"{name}.bn", (f"{name}.aa", *then))


BLOCKS = {
    "timm.models.resnet.BasicBlock": BlockDescription(
        (Part("conv1", "bn1", ("drop_block", "act1", "aa")), Part("conv2", "bn2")),
        ("se",), "drop_path", "downsample", activation="act2",
    ),
    "timm.models.resnet.Bottleneck": BlockDescription(
        (Part("conv1", "bn1", ("act1",)), Part("conv2", "bn2", ("drop_block", "act2", "aa")), Part("conv3", "bn3")),
        ("se",), "drop_path", "downsample", activation="act3",
    ),
    "timm.models.regnet.Bottleneck": BlockDescription(
        (wrapper("conv1"), wrapper("conv2", then=("se",)), wrapper("conv3")),
        (), "drop_path", "downsample", none_adds_nothing=True, activation="act3",
    ),
    "timm.models._efficientnet_blocks.EdgeResidual": BlockDescription(
        (Part("conv_exp", "bn1", ("aa", "se")), Part("conv_pwl", "bn2")), (), "drop_path", skips="has_skip",
    ),
    "timm.models._efficientnet_blocks.InvertedResidual": BlockDescription(
        (
            Part("conv_s2d", "bn_s2d"), Part("conv_pw", "bn1"), Part("conv_dw", "bn2", ("aa", "se")),
            Part("conv_pwl", "bn3"),
        ),
        (), "drop_path", skips="has_skip",
    ),
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv": BlockDescription(
        (Part("conv_s2d", "bn_s2d"), Part("conv_dw", "bn1", ("aa", "se")), Part("conv_pw", "bn2")),
        (), "drop_path", skips="has_skip",
    ),
    "timm.models._efficientnet_blocks.UniversalInvertedResidual": BlockDescription(
        (
            wrapper("dw_start"), wrapper("pw_exp"), wrapper("dw_mid", then=("se",)), wrapper("pw_proj"),
            wrapper("dw_end"),
        ),
        ("layer_scale",), "drop_path", skips="has_skip",
    ),
    "torchvision.models.mobilenetv2.InvertedResidual": BlockDescription(row="conv", skips="use_res_connect"),
    "torchvision.models.mobilenetv3.InvertedResidual": BlockDescription(row="block", skips="use_res_connect"),
    "torchvision.models.efficientnet.MBConv": BlockDescription(
        row="block", drop_path="stochastic_depth", skips="use_res_connect"
    ),
    "torchvision.models.efficientnet.FusedMBConv": BlockDescription(
        row="block", drop_path="stochastic_depth", skips="use_res_connect"
    ),
    "torchvision.models.mnasnet._InvertedResidual": BlockDescription(row="layers", skips="apply_residual"),
    "torchvision.models.regnet.ResBottleneckBlock": BlockDescription(
        (Part("f.a.0", "f.a.1", ("f.a.2",)), Part("f.b.0", "f.b.1", ("f.b.2", "f.se")), Part("f.c.0", "f.c.1")),
        shortcut="proj", activation="activation",
    ),
}  # fmt: skip
ORIGINALS = tuple(BLOCKS)
DROP_PATH = "timm.layers.drop", "DropPath"


class Found(NamedTuple):
    """A block as it is: its steps, the modules on the last one's output, what is added, and what comes last. shortcut:
    a `Beside`, a module to call, None for x, or "none"."""

    steps: tuple[Step, ...]
    attention: tuple[nn.Module, ...]
    drop_path: nn.Module | None
    shortcut: Beside | nn.Module | str | None
    activation: nn.Module | None


class Beside(NamedTuple):
    """A projection: its convolution and BatchNorm, and the average pool before them."""

    step: Step
    pool: nn.AvgPool2d | None


def find(block: nn.Module, described: BlockDescription) -> Found:
    """Raises AttributeError where the block has other parts."""
    steps = _row(named(block, described.row)) if described.row else []
    for part in described.parts:
        conv, after = named(block, part.conv), [named(block, name) for name in part.after]
        if not does_nothing(conv):
            steps.append(_segments.step(conv, named(block, part.norm), *after))
        elif not all(map(does_nothing, after)):
            raise AttributeError(f"{part.conv} is left out, but not what follows it")
    drop_path = described.drop_path and named(block, described.drop_path)
    activation = described.activation and named(block, described.activation)
    return Found(
        tuple(steps),
        tuple(m for m in (named(block, n) for n in described.attention) if not does_nothing(m)),
        None if does_nothing(drop_path) else drop_path,
        _shortcut(block, described),
        None if does_nothing(activation) else activation,
    )


def _row(container: nn.Module) -> list[Step]:
    steps, rest = [], list(_segments.flattened(container))
    while rest:
        conv, *rest = rest
        if not isinstance(conv, nn.Conv2d) or not rest or norm_kind(type(rest[0])) is None:
            raise AttributeError(f"a {type(conv).__name__} is where a convolution and its BatchNorm should be")
        norm, *rest = rest
        after = []
        while rest and not isinstance(rest[0], nn.Conv2d):
            after.append(rest[0])
            rest = rest[1:]
        steps.append(_segments.step(conv, norm, *after))
    return steps


def _shortcut(block: nn.Module, described: BlockDescription) -> Beside | nn.Module | str | None:
    if described.shortcut is None:
        skips = described.skips is not None and getattr(block, described.skips)
        return None if skips else "none"
    module = named(block, described.shortcut)
    if module is None and described.none_adds_nothing:
        return "none"
    if does_nothing(module):
        return None
    children = [child for child in module._modules.values() if not does_nothing(child)]
    pool = children.pop(0) if len(children) == 3 and _is_plain_pool(children[0]) else None
    if len(children) == 2 and not wrapped("shortcut", module):
        step = _segments.step(*children)
        if not step.after and _segments.refusal(module, [step]) is None and not _segments.pads_same(step.conv):
            return Beside(step, pool)
    return module


def _is_plain_pool(module: nn.Module) -> bool:
    return type(module) is nn.AvgPool2d and module.divisor_override is None and wrapped("pool", module) is None


def named(block: nn.Module, name: str) -> nn.Module | None:
    """A module inside a block by its dotted name, None where there is none."""
    for part in name.split("."):
        if block is None:
            return None
        found = block._modules.get(part)
        block = getattr(block, part, None) if found is None else found
    return block


def refusal(block: nn.Module) -> Reason | None:
    """Why the block, as it is now, must run its original forward."""
    described = BLOCKS[_name(block)]
    try:
        found = find(block, described)
    except AttributeError as error:
        return Reason("children", str(error))
    if not found.steps:
        return Reason("children", "there is no convolution")
    for container in _containers(block, described):
        reason = wrapped("a module between the block and its convolutions", container)
        if reason:
            return reason
    beside = [found.shortcut.step] if isinstance(found.shortcut, Beside) else []
    if any(norm_kind(type(norm)) == "sync" for _, norm, _ in (*found.steps, *beside)):
        # A process that runs the original forward, of an empty batch, would meet the others at another BatchNorm.
        return Reason("sync_order", "its SyncBatchNorms would meet in another order than in the original forward")
    reason = _segments.refusal(block, (*found.steps, *beside))
    if reason is None and type(found.activation) is nn.ReLU:
        reason = plain_refusal(described.activation, found.activation, nn.ReLU)
    return reason


def owned(block: nn.Module) -> list[nn.Module]:
    described = BLOCKS[_name(block)]
    found = find(block, described)
    inside = [*_segments.bypassed(found.steps), *_containers(block, described)]
    if isinstance(found.shortcut, Beside):
        inside += [named(block, described.shortcut), *_segments.bypassed([found.shortcut.step])]
    if type(found.activation) is nn.ReLU:
        inside.append(found.activation)
    return inside


def watched(block: nn.Module) -> list[nn.Module]:
    """Everything that `find` looks at."""
    described = BLOCKS[_name(block)]
    names = [name for part in described.parts for name in (part.conv, part.norm, *part.after)]
    names += [*described.attention, described.drop_path, described.shortcut, described.activation]
    found = [*_containers(block, described), *(named(block, name) for name in names if name is not None)]
    found += [child for module in found if module is not None for child in module._modules.values()]
    if described.row:  # in which BatchNorms may have activations inside
        found += [inner for m in _segments.flattened(named(block, described.row)) for inner in m._modules.values()]
    return [m for m in found if m is not None]


def run(block: nn.Module, x: Tensor, backend: str) -> Tensor:
    steps, attention, drop_path, shortcut, activation = find(block, BLOCKS[_name(block)])
    *before, last = _segments.segments(steps)
    called = len(attention) + len(last.then) > 0
    fits = not (called or last.ends or (drop_path is not None and not _drops_rows(drop_path)))
    y = _segments.run(before, x, backend)
    if isinstance(shortcut, str) or not fits:
        y = _segments.run([last], y, backend)
        for module in attention:
            y = module(y)
        if not isinstance(shortcut, str):
            y = (y if drop_path is None else drop_path(y)) + _tensor(shortcut, x, backend)
        return y if activation is None else activation(y)
    y = _segments.padded(last.pairs[0][0], y)
    convs, relu = _segments.convs(last), type(activation) is nn.ReLU
    beside = _argument(shortcut, x) if y is x else _tensor(shortcut, x, backend)
    row_scale = None if drop_path is None else _row_scale(drop_path, x, convs[-1])
    out = functional.conv_bn_add_relu(y, *convs, shortcut=beside, relu=relu, row_scale=row_scale, backend=backend)
    return out if relu or activation is None else activation(out)


def forms(block: nn.Module) -> str:
    found = find(block, BLOCKS[_name(block)])
    parts = _segments.segments(found.steps)
    texts = [f"{len(part.pairs)} convolution{'s'[: len(part.pairs) > 1]}" for part in parts]
    called = [type(m).__name__ for part in parts for m in part.then] + [type(m).__name__ for m in found.attention]
    return " + ".join(texts) + (f"; called: {', '.join(dict.fromkeys(called))}" if called else "")


def _argument(shortcut: Beside | nn.Module | None, x: Tensor):
    """What `functional` takes for it."""
    if not isinstance(shortcut, Beside):
        return shortcut if shortcut is None else shortcut(x)
    conv = _segments.read_modules(shortcut.step.conv, shortcut.step.norm)
    if shortcut.pool is None:
        return conv
    pool = shortcut.pool
    pairs = (v if isinstance(v, tuple) else (v, v) for v in (pool.kernel_size, pool.stride, pool.padding))
    return Pooled(conv, Window(*pairs, ceil_mode=pool.ceil_mode), pool.count_include_pad)


def _tensor(shortcut: Beside | nn.Module | None, x: Tensor, backend: str) -> Tensor:
    """The shortcut's output."""
    if shortcut is None:
        return x
    if not isinstance(shortcut, Beside):
        return shortcut(x)
    source = x if shortcut.pool is None else shortcut.pool(x)
    return _segments.chain(Segment(((*shortcut.step[:2], None),), False, ()), source, backend)


def _drops_rows(module: nn.Module) -> bool:
    return (type(module).__module__, type(module).__qualname__) == DROP_PATH and wrapped("drop_path", module) is None


def _row_scale(drop_path: nn.Module, x: Tensor, last: functional.ConvBN) -> Tensor | None:
    """What timm's DropPath would multiply each sample by, drawn as there."""
    if drop_path.drop_prob == 0 or not drop_path.training:
        return None
    keep = 1 - drop_path.drop_prob
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else last.weight.dtype
    drawn = torch.empty((len(x), 1, 1, 1), dtype=dtype, device=x.device).bernoulli_(keep)
    if keep > 0 and drop_path.scale_by_keep:
        drawn.div_(keep)
    return drawn.flatten()


def _containers(block: nn.Module, described: BlockDescription) -> list[nn.Module]:
    """The modules between the block and its convolutions."""
    names = dict.fromkeys(
        name[:i] for part in described.parts for name in (part.conv, part.norm) for i, c in enumerate(name) if c == "."
    )
    found = [m for m in (named(block, name) for name in names) if m is not None]
    if described.row:
        row = named(block, described.row)
        found += [row, *(m for m in row.modules() if _segments.is_container(m) and m is not row)]
    return found


def _name(block: nn.Module) -> str:
    cls = type(block).__dict__.get("original", type(block))
    return f"{cls.__module__}.{cls.__qualname__}"
