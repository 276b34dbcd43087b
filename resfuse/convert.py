"""fuse, unfuse, explain, report: find the blocks of a model that have a fused form, and say what was done and why."""

from __future__ import annotations

import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from .blocks import plans, runs
from .blocks.mixin import FusedMixin, State, conv_refusal, fused_class, original_class, owned
from .kernels import dispatch, measured
from .kernels.interface import Reason, Unsupported
from .memory import plan as memory_plan
from .memory.count import Uncounted, twin_of, without_data

LAYOUT = Reason(
    "layout_nchw",
    "convolution weights are NCHW; faster: model.to(memory_format=torch.channels_last) and inputs alike",
)
MEMORY = ("balanced", "lean", "leanest")
RUNS = Reason("run_by_blocks", "in torch.compile's graphs and under dispatch modes blocks keep what they keep balanced")
NOT_CONVERTED = Reason("not_converted", "fuse() was not called on it")


class FuseError(ValueError):
    """`fuse(..., strict=True)` found a convolution that it does not fuse; the message lists each."""


@dataclass(frozen=True)
class FuseConfig:
    """How fused blocks run.

    backend: "auto", or one kernel set that must then run every primitive: "triton" or "eager". "cpu" and "cuda" lack
    some, so that `fuse` raises Unsupported.
    memory: "balanced" keeps two narrow activations, the input and a 1-bit mask per bottleneck; "lean" the two narrow
    ones alone, where fused blocks follow one another in an nn.Sequential; "leanest" one of them. A float is the peak
    of a step that is allowed, as a share of eager's: each row of blocks is then as lean as it has to be.
    deterministic: None follows torch.use_deterministic_algorithms; our own kernels always are.
    """

    backend: str = "auto"
    memory: str | float = "balanced"
    deterministic: None = None

    def __post_init__(self):
        accepted = {"backend": dispatch.backends(), "memory": MEMORY, "deterministic": (None,)}
        for name, values in accepted.items():
            value, choices = getattr(self, name), ", ".join(map(repr, values))
            share = name == "memory" and isinstance(value, float)
            if share and not 0 < value <= 1:
                raise ValueError(f"FuseConfig.memory={value!r} is no share: more than 0 and at most 1")
            if not share and value not in values:
                raise ValueError(f"FuseConfig.{name}={value!r} is not available in this version; accepted: {choices}")


@dataclass
class Report:
    """What is fused in a model, what is not and why, and what happened at run time.

    fused: (fqn, class, forms of the wide products); skipped: (fqn, code, text); notes: (code, text);
    fallbacks: (fqn, code, text, count) of calls that ran the original forward; runs: (fqn, text) of each row of blocks
    that keeps less than they do one by one; splits: (fqn, code, text, count) of what cut such a row in calls; kernels:
    (primitive, kernel set, code, text) of refusals inside fused calls, of this process; coverage: share of the model's
    convolution multiply-adds inside fused blocks at `input_size`, None if that could not be counted.
    """

    fused: list[tuple[str, str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[Reason] = field(default_factory=list)
    fallbacks: list[tuple[str, str, str, int]] = field(default_factory=list)
    runs: list[tuple[str, str]] = field(default_factory=list)
    splits: list[tuple[str, str, str, int]] = field(default_factory=list)
    kernels: list[tuple[str, str, str, str]] = field(default_factory=list)
    coverage: float | None = None
    input_size: tuple[int, ...] = ()

    def __str__(self) -> str:
        size = "x".join(map(str, self.input_size))
        share = "unknown" if self.coverage is None else f"{self.coverage:.1%}"
        lines = [f"{len(self.fused)} blocks fused, {share} of convolution multiply-adds (input {size})"]
        for title, rows in (
            ("fused", self.fused), ("run", self.runs), ("not fused", self.skipped), ("note", self.notes),
            ("ran the original forward", self.fallbacks), ("cut a run", self.splits),
            ("kernel fallback (of this process)", self.kernels),
        ):
            if rows:
                lines += ["", title, *_columns([(first or "(the model)", *rest) for first, *rest in rows])]
        return "\n".join(lines)


def fuse(
    model: nn.Module,
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    config: FuseConfig | None = None,
    strict: bool = False,
    input_size: tuple[int, int, int, int] = (8, 3, 224, 224),
) -> nn.Module:
    """Replace the forward of every block that has a fused form, in place; returns the same model. Idempotent.

    filter_fn(module, fqn) -> bool: False leaves a block alone. strict: raise FuseError, before anything is changed,
    if any convolution stays outside a fused block. input_size: what config.memory counts with. Raises Unsupported if
    config names a backend that cannot run, ValueError where memory asks for a share of eager's peak that cannot be:
    nothing is changed then either.
    """
    config = config or FuseConfig()
    _check_model(model)
    blocks, skipped = [], []
    for fqn, module, reason in _survey(model, filter_fn):
        if reason is None:
            blocks.append(module)
        else:
            skipped.append((fqn, *reason))
    if strict and skipped:
        raise FuseError("not fused:\n" + "\n".join(_columns(skipped)))
    if config.backend != "auto":
        _check_backend(config.backend, blocks)
    rows = runs.find(model, {id(module) for module in blocks})
    plan = None if config.memory == "balanced" else _memory_plan(model, rows, blocks, config.memory, input_size)
    for module in blocks:
        if not isinstance(module, FusedMixin):
            module.__class__ = fused_class(type(module), plans.plan_for(type(module)))
        module.__dict__["_resfuse_state"] = State(config.backend)
    for fqn, module in model.named_modules():
        option = None if plan is None else plan.options.get(fqn)
        if option is not None and option.memory != "balanced":
            if fqn in rows:
                module.__class__ = fused_class(nn.Sequential, runs)
            module.__dict__["_resfuse_state"] = State(config.backend, option.memory, option.every, plan.share)
        elif runs.is_run(module):
            _undo(module)
    if plan is not None and not plan.options:
        text = f"memory={config.memory!r} changes nothing: no nn.Sequential in {type(model).__name__} has fused blocks"
        warnings.warn(text, stacklevel=2)
    if not blocks:
        warnings.warn(f"resfuse.fuse fused nothing in {type(model).__name__}; see resfuse.explain(model)", stacklevel=2)
    if "torch.utils.flop_counter" in sys.modules:  # which imports Triton: only where the program has
        from .functions import flops

        flops.register()
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Give every fused module its original class back, in place; returns the same model.

    A class of your own that subclasses a fused one has no other forward: it is left as it is, with a warning.
    """
    _check_model(model)
    for module in model.modules():
        if isinstance(module, FusedMixin):
            original = original_class(type(module))
            if original is type(module):
                warnings.warn(f"{original.__qualname__} is defined as a fused block and stays one", stacklevel=2)
                continue
            _undo(module)
    return model


def _memory_plan(
    model: nn.Module, rows: dict[str, nn.Sequential], blocks: list[nn.Module], memory: str | float, input_size
) -> memory_plan.Plan:
    """How lean each row and each stem becomes."""
    chosen = {id(module) for module in blocks}
    found, stems = [], []
    for fqn, row in rows.items():
        children = (
            (_inside(fqn, name), child, plans.plan_of(child) if id(child) in chosen and runs.can_join(child) else None)
            for name, child in row.named_children()
        )
        found.append(memory_plan.Row(fqn, tuple(children)))
    for fqn, module in model.named_modules():
        ends = getattr(plans.plan_of(module), "stem_ends", lambda _: None)(module) if id(module) in chosen else None
        if ends is not None and conv_refusal(ends[0], module.get_submodule(ends[0])) is None:
            weight = module.get_submodule(ends[0]).weight
            stems.append(memory_plan.Stem(fqn, *(_inside(fqn, name) for name in ends), weight))
    try:
        return memory_plan.make(model, found, stems, memory, input_size)
    except Uncounted as error:
        if isinstance(memory, float):
            raise ValueError(f"memory={memory} is a share of eager's peak, which cannot be counted: {error}") from error
        return memory_plan.uncounted(found, stems, memory)


def _inside(fqn: str, name: str) -> str:
    return f"{fqn}.{name}" if fqn else name


def _undo(module: nn.Module) -> None:
    module.__dict__.pop("_resfuse_state", None)
    module.__class__ = original_class(type(module))


def explain(
    model: nn.Module,
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    input_size: tuple[int, int, int, int] = (1, 3, 224, 224),
) -> Report:
    """What `fuse` would do, and why not more; changes nothing."""
    _check_model(model)
    return _describe(model, list(_survey(model, filter_fn)), input_size)


def report(model: nn.Module, *, input_size: tuple[int, int, int, int] = (1, 3, 224, 224)) -> Report:
    """What is fused in the model now, and what its calls so far fell back to."""
    _check_model(model)
    survey = [
        (fqn, module, reason or (None if isinstance(module, FusedMixin) else NOT_CONVERTED))
        for fqn, module, reason in _survey(model, None)
    ]
    result = _describe(model, survey, input_size)
    for fqn, module, _ in survey:
        if isinstance(module, FusedMixin):
            counts = module.resfuse_state.fallbacks
            result.fallbacks += [(fqn, code, text, count) for code, (count, text) in counts.items()]
    leaner = [(fqn, module) for fqn, module in model.named_modules() if _is_leaner(module)]
    for fqn, module in leaner:
        state = module.resfuse_state
        if not runs.is_run(module):
            result.runs.append((fqn, f"stem, {state.memory}"))
            continue
        result.runs.append((fqn, runs.forms(module)))
        result.fallbacks += [(fqn, code, text, count) for code, (count, text) in state.fallbacks.items()]
        result.splits += [(fqn, code, text, count) for code, (count, text) in state.splits.items()]
    if leaner:
        share = leaner[0][1].resfuse_state.share
        result.notes += [RUNS] if share is None else [RUNS, Reason("peak", f"{share:.2f} of eager's, as counted")]
    backends = {module.resfuse_state.backend for _, module, _ in survey if isinstance(module, FusedMixin)}
    for name in sorted(name for name in backends & set(dispatch.ORDER) if not measured.proven(name, "cuda")):
        result.notes.append(Reason("unproven", f"kernel set {name}: {dispatch.kernel_set(name).STATUS}"))
    for name in sorted(name for name in backends & measured.UNPROVEN.keys() if measured.proven(name, "cuda")):
        untested = f"as they are, {', '.join(measured.UNPROVEN[name])} have passed their tests on no GPU"
        result.notes.append(Reason("unproven", f"kernel set {name}: {untested}"))
    result.kernels = [(primitive, name, *reason) for primitive, name, reason in dispatch.fallbacks()]
    return result


def _is_leaner(module: nn.Module) -> bool:
    return isinstance(module, FusedMixin) and module.resfuse_state.memory != "balanced"


def _survey(
    model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None
) -> Iterator[tuple[str, nn.Module, Reason | None]]:
    """(fqn, module, None) for each block with a fused form; (fqn, module, reason) for what holds other convolutions."""
    seen: set[int] = set()

    def visit(module: nn.Module, fqn: str, parent: nn.Module, quiet: bool = False):
        if id(module) in seen:
            return
        seen.add(id(module))
        plan = plans.plan_of(module)
        if plan is not None and plan is not runs:
            refused = plan.refusal(module)
            if filter_fn is not None and not filter_fn(module, fqn):
                yield fqn, module, Reason("filtered", "filter_fn returned False")
            else:
                yield fqn, module, refused
            # What a block that runs its original forward calls may have a fused form of its own.
            if refused is None:
                seen.update(id(inner) for inner in owned(plan, module))
            for name, child in module.named_children():
                yield from visit(child, f"{fqn}.{name}" if fqn else name, module, refused is not None)
        elif isinstance(module, nn.modules.conv._ConvNd):
            if quiet:  # its block's reason is there
                return
            owner = type(parent).__name__
            yield fqn, module, Reason("no_plan", f"a convolution in {owner}, which has no fused form")
        else:
            for name, child in module.named_children():
                yield from visit(child, f"{fqn}.{name}" if fqn else name, module)

    return visit(model, "", model)


def _describe(model: nn.Module, survey: list[tuple[str, nn.Module, Reason | None]], input_size) -> Report:
    result = Report(input_size=tuple(input_size))
    blocks = [(fqn, module) for fqn, module, reason in survey if reason is None]
    for fqn, module in blocks:
        result.fused.append((fqn, type(module).__name__, plans.plan_of(module).forms(module)))
    result.skipped = [(fqn, *reason) for fqn, _, reason in survey if reason is not None]
    inside = {id(inner): inner for _, module in blocks for inner in owned(plans.plan_of(module), module)}.values()
    if any(_is_nchw(conv) for conv in inside if isinstance(conv, nn.Conv2d)):
        result.notes.append(LAYOUT)
    result.coverage = _coverage(model, inside, result.input_size)
    return result


def _coverage(model: nn.Module, inside: list[nn.Module], input_size: tuple[int, ...]) -> float | None:
    """Share of convolution multiply-adds in `inside`, from a forward of a copy without data, hooks or training."""
    macs: Counter[int] = Counter()
    try:
        twin = twin_of(model).eval()
        for module, original in zip(twin.modules(), model.modules(), strict=True):
            if isinstance(module, nn.modules.conv._ConvNd):
                def count(conv: nn.Module, _, output: torch.Tensor, key: int = id(original)) -> None:
                    macs[key] += output[:, 0].numel() * conv.weight.numel()

                module.register_forward_hook(count)
        with torch.no_grad():
            twin(without_data(twin, input_size))
    except Exception:  # a model may want other inputs, look at its data, or not be copied: then the share is unknown
        return None
    total = sum(macs.values())
    return sum(macs[id(module)] for module in inside) / total if total else None


def _is_nchw(conv: nn.Conv2d) -> bool:
    weight = conv.weight
    return math.prod(weight.shape[2:]) > 1 and not weight.is_contiguous(memory_format=torch.channels_last)


def _check_model(model) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _check_backend(backend: str, blocks: list[nn.Module]) -> None:
    reasons = {
        reason
        for block in blocks
        for parameter in block.parameters()
        for reason in dispatch.missing(backend, parameter.device.type, parameter.dtype)
    }
    if reasons:
        raise Unsupported(sorted(reasons))


def _columns(rows: list[tuple]) -> list[str]:
    text = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in text)
    return ["  " + "  ".join(cells).rstrip() for cells in padded]
