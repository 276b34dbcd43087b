"""Blocks of other libraries, each described by the names of its parts: what that means.

    y = before(x);  for each convolution: y = its modules(act(bn(conv(y))))
    out = activation(drop_path(attention(y)) + shortcut(x))

What the chain fuser cannot take into one Function (`_segments.py`) is called as a module between two chains. The table
is in `descriptions.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from .. import functional
from ..functional import Block, Pooled
from ..kernels.interface import Reason
from . import _segments
from ._drop_path import drops_rows, row_scale
from ._pool import average_window, is_plain_average
from ._segments import Segment, Step, does_nothing
from .descriptions import BLOCKS, BlockDescription
from .mixin import (
    CALLS_NORM,
    SOME,
    FusedMixin,
    calls_norm,
    norm_kind,
    original_name,
    plain_refusal,
    qualified_name,
    wrapped,
)

LISTS = False
OWNS = SOME
ORIGINALS = tuple(BLOCKS)
OURS = frozenset(BLOCKS)  # before others are registered
WRAPPERS = frozenset((
    *_segments.CONTAINERS, "torch.nn.modules.linear.Identity", "timm.layers.conv_bn_act.ConvNormAct",
    "torchvision.models.regnet.BottleneckTransform",
    "transformers.models.resnet.modeling_resnet.ResNetConvLayer",
    "transformers.models.resnet.modeling_resnet.ResNetShortCut",
    "transformers.models.regnet.modeling_regnet.RegNetConvLayer",
    "transformers.models.regnet.modeling_regnet.RegNetShortCut", ".".join(CALLS_NORM),
))  # fmt: skip
FLOAT_FUNCTIONAL = "torch.ao.nn.quantized.modules.functional_modules.FloatFunctional"
OBSERVER = "activation_post_process"
CALLED = nn.ReLU()  # stands for the one that a forward calls as a function


class Found(NamedTuple):
    """A block as it is: the modules before its first step, its steps, the modules on the last one's output, what is
    added, and what comes last. shortcut: a `Beside`, a module to call, None for x, or "none"."""

    before: tuple[nn.Module, ...]
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
        conv, norm = named(block, part.conv), named(block, part.norm)
        after = [named(block, name, absent=True) for name in part.after]
        if not does_nothing(conv):
            steps.append(_segments.step(conv, norm, *[CALLED][: part.relu], *after))
        elif not all(map(does_nothing, (norm, *after))):
            raise AttributeError(f"{part.conv} is left out, but not what follows it")
    drop_path = described.drop_path and named(block, described.drop_path)
    activation = CALLED if described.relu else described.activation and named(block, described.activation)
    if described.adds is not None:
        activation = _adds(block, described.adds)
    before, attention = (
        tuple(m for m in (named(block, n) for n in names) if not does_nothing(m))
        for names in (described.before, described.attention)
    )
    return Found(
        before,
        tuple(steps),
        attention,
        None if does_nothing(drop_path) else drop_path,
        _shortcut(block, described),
        None if does_nothing(activation) else activation,
    )


def _adds(block: nn.Module, name: str) -> nn.ReLU:
    """What a FloatFunctional does after its sum, if it does not observe that for a quantization."""
    module = named(block, name)
    if qualified_name(type(module)) != FLOAT_FUNCTIONAL or not does_nothing(named(block, f"{name}.{OBSERVER}")):
        raise AttributeError(f"{name} is a {type(module).__name__} that does more than add and ReLU")
    return CALLED


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
    if calls_norm(module):
        children.insert(0, module)
    pool = children.pop(0) if len(children) == 3 and is_plain_average(children[0]) else None
    if len(children) == 2 and not wrapped("shortcut", module) and _is_known(block, module):
        step = _segments.step(*children)
        if not step.after and _segments.refusal(module, [step]) is None and not _segments.pads_same(step.conv):
            return Beside(step, pool)
    return module


def named(block: nn.Module, name: str, absent: bool = False) -> nn.Module | None:
    """A module inside a block by its dotted name; None where there is none, or an identity where it would be inside.
    AttributeError for what is no module, and, unless it may be absent from where it belongs, for what is not there."""
    inside, *rest = name.split(".")
    module = _child(block, inside)
    for part in rest:
        if module is None or type(module) is nn.Identity:
            return None
        if not absent and part not in module._modules and not hasattr(module, part):
            raise AttributeError(f"{inside} is a {type(module).__name__}, without {part}")
        module, inside = _child(module, part), f"{inside}.{part}"
    if module is not None and not isinstance(module, nn.Module):
        raise AttributeError(f"{name} is a {type(module).__name__}, no module")
    return module


def _child(module: nn.Module, name: str):
    found = module._modules.get(name)
    return getattr(module, name, None) if found is None else found


def refusal(block: nn.Module) -> Reason | None:
    """Why the block, as it is now, must run its original forward."""
    described = BLOCKS[original_name(block)]
    try:
        found, containers = find(block, described), _containers(block, described)
    except AttributeError as error:
        return Reason("children", str(error))
    if not found.steps:
        return Reason("children", "there is no convolution")
    for name, container in containers:
        reason = wrapped(name, container)
        if reason is None and not _is_known(block, container):
            reason = Reason("module_type", f"{name} is a {type(container).__name__}, which is not read")
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
    described = BLOCKS[original_name(block)]
    found = find(block, described)
    inside = [*_segments.bypassed(found.steps), *(module for _, module in _containers(block, described))]
    if isinstance(found.shortcut, Beside):
        inside += [named(block, described.shortcut), *_segments.bypassed([found.shortcut.step])]
    if type(found.activation) is nn.ReLU:
        inside.append(found.activation)
    return inside


def watched(block: nn.Module) -> list[nn.Module]:
    """Everything that `find` looks at."""
    described = BLOCKS[original_name(block)]
    names = [name for part in described.parts for name in (part.conv, part.norm, *part.after)]
    names += [*described.attention, described.drop_path, described.shortcut, described.activation]
    names += [described.adds, f"{described.adds}.{OBSERVER}"] if described.adds else []
    found = [module for _, module in _containers(block, described)]
    found += [named(block, name, absent=True) for name in names if name is not None]
    found += [child for module in found if module is not None for child in module._modules.values()]
    if described.row:  # in which BatchNorms may have activations inside
        found += [inner for m in _segments.flattened(named(block, described.row)) for inner in m._modules.values()]
    return [m for m in found if m is not None]


def run(block: nn.Module, x: Tensor, backend: str, given: Tensor | None = None, *_) -> Tensor:
    """given: what is added in the place of x, in blocks with an identity for their shortcut."""
    found = find(block, BLOCKS[original_name(block)])
    before, steps, attention, drop_path, shortcut, activation = found
    _segments.check_proven(steps, x, backend)
    shortcut, y = shortcut if given is None else given, x
    for module in before:
        y = module(y)
    *chains, last = _segments.segments(steps)
    y = _segments.run(chains, y, block)
    if isinstance(shortcut, str) or not _fits(found, last):
        y = _segments.run([last], y, block)
        for module in attention:
            y = module(y)
        if not isinstance(shortcut, str):
            y = (y if drop_path is None else drop_path(y)) + _tensor(shortcut, x, block)
        return y if activation is None else activation(y)
    convs, relu = _segments.convs(last), type(activation) is nn.ReLU
    beside = _argument(shortcut, x) if len(before) + len(chains) == 0 else _tensor(shortcut, x, block)
    rows = None if drop_path is None else row_scale(drop_path, x, convs[-1].weight)

    def fused() -> Tensor:
        own = _segments.padded(last.pairs[0][0], y)
        out = functional.conv_bn_add_relu(own, *convs, shortcut=beside, relu=relu, row_scale=rows, backend=backend)
        return out if relu or activation is None else activation(out)

    def called() -> Tensor:
        out = _segments.called(last, y)
        out = out if rows is None else out * rows[:, None, None, None]
        out = out + (beside if isinstance(beside, Tensor) else _tensor(shortcut, x, block))
        return out if activation is None else activation(out)

    return _segments.attempt(block, fused, called)


def _fits(found: Found, last: Segment) -> bool:
    """Whether nothing is called between the last chain and the sum."""
    called = len(found.attention) + len(last.then) > 0 or last.ends
    return not called and (found.drop_path is None or drops_rows(found.drop_path))


def as_block(block: nn.Module, x: Tensor) -> Block | Reason:
    """As a run has it."""
    found = find(block, BLOCKS[original_name(block)])
    *before, last = _segments.segments(found.steps)
    if isinstance(found.shortcut, str):
        return Reason("no_shortcut", "it has no shortcut")
    called = len(before) + len(found.before) > 0 or not _fits(found, last) or _segments.pads_same(last.pairs[0][0])
    if called or not (found.shortcut is None or isinstance(found.shortcut, Beside)):
        return Reason("called", "it calls modules of its own")
    if type(found.activation) not in (nn.ReLU, type(None)):
        return Reason("called", f"it calls its {type(found.activation).__name__}")
    backend = block.resfuse_state.backend if isinstance(block, FusedMixin) else "auto"  # it may be counted before
    unproven = _segments.unproven(found.steps, x, backend)
    if unproven:
        return Reason("unproven", unproven)
    convs = tuple(_segments.convs(last))
    rows = None if found.drop_path is None else row_scale(found.drop_path, x, convs[-1].weight)
    return Block(convs, _argument(found.shortcut, x), type(found.activation) is nn.ReLU, row_scale=rows)


def forms(block: nn.Module) -> str:
    found = find(block, BLOCKS[original_name(block)])
    parts = _segments.segments(found.steps)
    texts = [f"{len(part.pairs)} convolution{'s'[: len(part.pairs) > 1]}" for part in parts]
    modules = (*found.before, *(m for part in parts for m in part.then), *found.attention)
    called = [type(m).__name__ for m in modules]
    return " + ".join(texts) + (f"; called: {', '.join(dict.fromkeys(called))}" if called else "")


def _argument(shortcut: Beside | nn.Module | Tensor | None, x: Tensor):
    """What `functional` takes for it."""
    if not isinstance(shortcut, Beside):
        return shortcut if shortcut is None or isinstance(shortcut, Tensor) else shortcut(x)
    conv = _segments.read_modules(shortcut.step.conv, shortcut.step.norm)
    if shortcut.pool is None:
        return conv
    return Pooled(conv, average_window(shortcut.pool), shortcut.pool.count_include_pad)


def _tensor(shortcut: Beside | nn.Module | Tensor | None, x: Tensor, block: nn.Module) -> Tensor:
    """The shortcut's output."""
    if shortcut is None or isinstance(shortcut, Tensor):
        return x if shortcut is None else shortcut
    if not isinstance(shortcut, Beside):
        return shortcut(x)
    source = x if shortcut.pool is None else shortcut.pool(x)
    return _segments.chain(Segment(((*shortcut.step[:2], None),), False, ()), source, block)


def _containers(block: nn.Module, described: BlockDescription) -> list[tuple[str, nn.Module]]:
    """The modules between the block and its convolutions, by name. AttributeError where one has a child that is not
    described."""
    parts = [name for part in described.parts for name in (part.conv, part.norm, *part.after)]
    names = dict.fromkeys(
        name[:i] for part in described.parts for name in (part.conv, part.norm) for i, c in enumerate(name) if c == "."
    )
    found = [(name, module) for name in names if (module := named(block, name)) is not None]
    others = [*parts, *described.attention]
    for name, module in found:
        for child, inner in module._modules.items():
            full = f"{name}.{child}"
            if not does_nothing(inner) and not any(f"{other}.".startswith(f"{full}.") for other in others):
                raise AttributeError(f"{full} is not described")
    if described.row:
        row = named(block, described.row)
        found.append((described.row, row))
        inner = (m for m in row.modules() if _segments.is_container(m) and m is not row)
        found += [(f"a {type(m).__name__} in {described.row}", m) for m in inner]
    return found


def _is_known(block: nn.Module, container: nn.Module) -> bool:
    """Whether a module is of a class that calls its children in order. Who registers a block vouches for its own."""
    return original_name(block) not in OURS or original_name(container) in WRAPPERS
