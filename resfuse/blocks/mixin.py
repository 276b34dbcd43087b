"""The class that a fused module is moved to: the original forward behind a per-call gate.

`fuse` assigns `module.__class__`; no tensor moves and no parameter is cached, so state dict keys, optimizers, EMA,
`isinstance` and pickling go on as before, and assigning the class back undoes it.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..arguments import BN, STORAGE_DTYPES, ArgumentError, Conv, ConvBN
from ..kernels.interface import Activation, Reason
from . import gate
from .disabled import is_disabled

FROZEN = (("torchvision.ops.misc", "FrozenBatchNorm2d"), ("detectron2.layers.batch_norm", "FrozenBatchNorm2d"))
CALLS_NORM = "detectron2.layers.wrappers", "Conv2d"  # and then, where it has one, its activation
SAME = "timm.layers.conv2d_same", "Conv2dSame"  # pads by what its input's size asks for
WITH_ACTIVATION = {  # inside them, as children; nothing else of theirs differs
    ("timm.layers.norm_act", "BatchNormAct2d"): "batch", ("timm.layers.norm_act", "SyncBatchNormAct"): "sync",
}  # fmt: skip
GIVEN_SHORTCUT = tuple(f"timm.models.dla.{name}" for name in ("DlaBasic", "DlaBottleneck", "DlaBottle2neck"))
SOME = "some"
PLAIN = (nn.Parameter, torch.Tensor, type(None))  # subclasses may do more
tracing_state, functorch_level = torch._C._get_tracing_state, torch._C._functorch.peek_interpreter_stack


class Unproven(ArgumentError):
    """The original forward is the better choice until kernels have been tested where the call is."""


class State:
    """What a fused module carries besides its own attributes.

    backend; memory: what it keeps, as in `FuseConfig`; every: after how many blocks a run keeps an output; share: the
    model's peak so, as a share of eager's, None where that was not counted; fallbacks, splits: per code the count of
    calls that ran the original forward, or cut a run, and the last one's reason; record: how the module was when it was
    last looked at (`gate.py`).
    """

    record: tuple | None = None

    def __init__(
        self, backend: str = "auto", memory: str = "balanced", every: int = 1, share: float | None = None
    ):
        self.backend, self.memory, self.every, self.share = backend, memory, every, share
        self.fallbacks: dict[str, tuple[int, str]] = {}
        self.splits: dict[str, tuple[int, str]] = {}

    def __getstate__(self) -> dict:
        return {name: held for name, held in self.__dict__.items() if name != "record"}  # a copy is looked at anew

    def count(self, reason: Reason) -> None:
        _count(self.fallbacks, reason)

    def split(self, reason: Reason) -> None:
        _count(self.splits, reason)


def _count(counts: dict[str, tuple[int, str]], reason: Reason) -> None:
    counts[reason.code] = counts.get(reason.code, (0, ""))[0] + 1, reason.text


class Pair(NamedTuple):
    """The names of a convolution and its BatchNorm inside a block, dotted where they lie one deeper."""

    conv: str
    norm: str

    def modules(self, block: nn.Module) -> tuple[nn.Module, nn.Module]:
        found = block._modules  # read directly: this runs at every call
        if "." not in self.conv:
            return found[self.conv], found[self.norm]
        inner, _, conv = self.conv.partition(".")
        children = found[inner]._modules
        return children[conv], children[self.norm[len(inner) + 1 :]]


class FusedMixin:
    """Put before a block's class by `fused_class`, in one of the forms below. Their subclasses name a plan: what to
    check and what to run."""

    plan = None

    @property
    def resfuse_state(self) -> State:
        state = self.__dict__.get("_resfuse_state")
        if state is None:  # a block constructed from the fused class, not converted
            state = self.__dict__["_resfuse_state"] = State()
        return state

    def _run(self, original, x, *others):
        if torch.compiler.is_compiling():
            if self._in_graph():
                return self.plan.run(self, x, self.resfuse_state.backend, *others)
            return original(x, *others)
        reason = self._refusal(x)
        if reason is None:
            try:
                return self.plan.run(self, x, self.resfuse_state.backend, *others)
            except ArgumentError as error:
                reason = Reason("unproven" if isinstance(error, Unproven) else "argument", str(error))
        if reason.code != "disabled":
            self.resfuse_state.count(reason)
        return original(x, *others)

    def _refusal(self, x) -> Reason | None:
        """Why this call must run the original forward."""
        if type(x) is list and self.plan.LISTS:
            reason = next(filter(None, map(call_refusal, x)), None)
        else:
            reason = call_refusal(x)
        if reason is not None:
            return reason
        unchanged, state = gate.comparison(), self.resfuse_state
        if unchanged is not None and state.record is not None and unchanged(state.record, self, PLAIN):
            return None
        reason = self.plan.refusal(self)
        replica = "_is_replica" in self.__dict__  # DataParallel's share the state, and live for one call
        if reason is None and unchanged is not None and not replica:
            state.record = gate.record(self, watched(self.plan, self))
        return reason

    def _in_graph(self) -> bool:
        """Whether the fused forward goes into the graph that Dynamo is making."""
        if not torch.compiler.is_dynamo_compiling():
            return False
        from . import _dynamo

        return _dynamo.fused() and self.plan.refusal(self) is None

    def __prepare_scriptable__(self):
        """torch.jit.script asks for what it may compile."""
        name = type(self).__qualname__
        raise RuntimeError(f"torch.jit.script cannot compile a fused {name}: call resfuse.unfuse(model) first")

    def __reduce_ex__(self, protocol):
        original = original_class(type(self))
        if original is type(self):  # a user's subclass of a fused class pickles as any class
            return super().__reduce_ex__(protocol)
        return _new_fused, (original, self.plan.__name__), self.__dict__.copy()


class Forward(FusedMixin):
    def forward(self, x):  # torch.fx would carry an annotation into its programs as a string, unknown to torch.jit
        return self._run(super().forward, x)


class ForwardGivenShortcut(FusedMixin):
    """Of blocks that may be given what they add in the place of x: timm's DLA."""

    def forward(self, x, shortcut=None, children=None):
        return self._run(super().forward, x, shortcut, children)


class ForwardFeatures(FusedMixin):
    """Of timm's networks, whose forward calls it."""

    def forward_features(self, x):
        return self._run(super().forward_features, x)


def owned(plan: ModuleType, block: nn.Module) -> list[nn.Module]:
    """The modules inside a block that its plan runs itself, with all that is in them."""
    if plan.OWNS is SOME:
        return plan.owned(block)
    if plan.OWNS is None:
        return list(block.modules())[1:]
    return [inner for name in plan.OWNS for inner in block.get_submodule(name).modules()]


def watched(plan: ModuleType, block: nn.Module) -> list[nn.Module]:
    """The modules that a plan's refusal may depend on."""
    return plan.watched(block) if plan.OWNS is SOME else owned(plan, block)


def call_refusal(x) -> Reason | None:
    """Why this call must run the original forward, as far as the input and the interpreter's state tell."""
    if is_disabled():
        return Reason("disabled", "inside resfuse.disabled() or under RESFUSE_DISABLE=1")
    if type(x) not in PLAIN:
        return Reason("input_type", f"the input is a {type(x).__name__}, not a plain tensor")
    if tracing_state() is not None:
        return Reason("tracing", "being traced by torch.jit")
    if x.dim() != 4 or x.numel() == 0:
        return Reason("input_shape", f"the input {tuple(x.shape)} is empty or not 4-dimensional")
    if not (x.is_cpu or x.is_cuda):
        return Reason("device", f"the input is on {x.device.type}; cpu and cuda are served")
    if x.dtype not in STORAGE_DTYPES:
        return Reason("dtype", f"the input is {x.dtype}")
    if functorch_level() is not None:
        return Reason("functorch", "inside a torch.func transform")
    if forward_ad._current_level >= 0:
        return Reason("forward_ad", "inside forward-mode differentiation")
    return None


def pair_refusal(block: nn.Module, pair: Pair) -> Reason | None:
    """Why a convolution and its BatchNorm cannot be read and run from outside their modules."""
    conv, norm = pair.modules(block)
    return conv_refusal(pair.conv, conv) or norm_refusal(pair.norm, norm)


def conv_refusal(name: str, conv: nn.Module, others: bool = False) -> Reason | None:
    """others: whether timm's Conv2dSame and detectron2's Conv2d will do too."""
    if type(conv) is not nn.Conv2d and not (others and (pads_same(conv) or calls_norm(conv))):
        return Reason("module_type", f"{name} is a {type(conv).__name__}, not nn.Conv2d")
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return Reason("padding", f"{name} pads by {conv.padding_mode!r}, {conv.padding!r}; zeros by numbers only")
    return _inside_refusal(name, conv)


def norm_refusal(name: str, norm: nn.Module, acts: bool = False) -> Reason | None:
    """acts: whether those with an activation inside will do too."""
    kind = norm_kind(type(norm))
    if kind is None or (has_activation(type(norm)) and not acts):
        return Reason("module_type", f"{name} is a {type(norm).__name__}, not nn.BatchNorm2d")
    if kind == "sync" and torch.compiler.is_compiling():
        return Reason("sync_in_graph", f"{name} is a SyncBatchNorm, whose collectives are in no graph of ours")
    return _inside_refusal(name, norm)


def plain_refusal(name: str, module: nn.Module, cls: type) -> Reason | None:
    """Why a module without parameters is not just its class's forward."""
    if type(module) is not cls:
        return Reason("module_type", f"{name} is a {type(module).__name__}, not nn.{cls.__name__}")
    return wrapped(name, module)


def _inside_refusal(name: str, module: nn.Module) -> Reason | None:
    reason = wrapped(name, module)
    if reason:
        return reason
    for parameter in module._parameters.values():
        if type(parameter) not in PLAIN:
            return Reason("parameter_type", f"a parameter of {name} is a {type(parameter).__name__}")
    return None


def wrapped(name: str, module: nn.Module) -> Reason | None:
    """Why calling the module is more than its class's forward: hooks, or a forward of its own."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return Reason("inner_hook", f"{name} has a hook")
    if "forward" in module.__dict__:
        return Reason("own_forward", f"{name} has a forward of its own")
    return None


def read_pair(block: nn.Module, pair: Pair) -> ConvBN:
    """The pair's tensors and settings as they are now; nothing is cached between calls."""
    return read_modules(*pair.modules(block))


def read_modules(conv: nn.Module, norm: nn.Module, act: Activation | None = None) -> ConvBN:
    weight, bias, *geometry = read_conv(conv)
    *tensors, eps, momentum, training, group = read_norm(norm)
    return ConvBN(weight, *tensors, bias, *geometry, eps, momentum, training, group, act)


def read_conv(conv: nn.Module) -> Conv:
    weight, bias = _tensors(conv, conv._parameters, "weight", "bias")
    return Conv(weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def read_norm(norm: nn.Module) -> BN:
    kind = norm_kind(type(norm))
    if kind == "frozen":
        return BN(norm.weight, norm.bias, norm.running_mean, norm.running_var, None, norm.eps, None, False)
    gamma, beta = _tensors(norm, norm._parameters, "weight", "bias")
    training = norm.training
    mean = var = tracked = None
    if norm.track_running_stats or not training:
        mean, var, tracked = _tensors(norm, norm._buffers, "running_mean", "running_var", "num_batches_tracked")
    group = _group(norm) if training and kind == "sync" else None
    return BN(gamma, beta, mean, var, tracked, norm.eps, norm.momentum, training, group)


def _tensors(module: nn.Module, held: dict, *names: str) -> list[Tensor | None]:
    """Attributes of a module, read where they are: through nn.Module.__getattr__ each is ten times as much."""
    try:
        return [held[name] for name in names]
    except KeyError:  # DataParallel's replicas have plain attributes instead
        return [getattr(module, name) for name in names]


def _group(norm: nn.SyncBatchNorm) -> dist.ProcessGroup | None:
    """The processes that share its statistics, None where there are no others."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def norm_kind(cls: type) -> str | None:
    """"batch", "sync", "frozen", or None for a class that is not read."""
    if cls is nn.BatchNorm2d:
        return "batch"
    if cls is nn.SyncBatchNorm:
        return "sync"
    name = cls.__module__, cls.__qualname__
    return "frozen" if name in FROZEN else WITH_ACTIVATION.get(name)


def has_activation(cls: type) -> bool:
    return (cls.__module__, cls.__qualname__) in WITH_ACTIVATION


def pads_same(conv: nn.Module) -> bool:
    return (type(conv).__module__, type(conv).__qualname__) == SAME


def calls_norm(conv: nn.Module) -> bool:
    """Whether the convolution itself calls its BatchNorm and activation, which are inside it."""
    return (type(conv).__module__, type(conv).__qualname__) == CALLS_NORM


@cache
def qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@cache
def fused_class(cls: type, plan) -> type:
    """The fused subclass of a block's class; the plan's module offers it under the class's own name."""
    namespace = {"plan": plan, "original": cls, "__module__": plan.__name__, "__doc__": cls.__doc__}
    mixin = ForwardGivenShortcut if qualified_name(cls) in GIVEN_SHORTCUT else Forward
    if getattr(plan, "METHOD", "forward") == "forward_features":
        mixin = ForwardFeatures
    return type(cls.__name__, (mixin, cls), namespace)


def export(name: str, plan: str, originals: tuple[str, ...]) -> type:
    """A plan's module attribute: the fused class of one of its originals, whose library is imported for it."""
    for original in originals:
        module, _, own = original.rpartition(".")
        if own == name:
            try:
                found = importlib.import_module(module)
            except ModuleNotFoundError as error:
                library = module.partition(".")[0]
                if error.name != library:
                    raise
                text = f"{name} is {original}, fused, and {library} is not installed: pip install {library}"
                raise ModuleNotFoundError(text, name=library) from None
            return fused_class(getattr(found, name), sys.modules[plan])
    raise AttributeError(f"module {plan!r} has no attribute {name!r}")


def original_class(cls: type) -> type:
    """The class that `fused_class` was given; any other class is its own."""
    return cls.__dict__["original"] if "original" in cls.__dict__ and issubclass(cls, FusedMixin) else cls


def original_name(block: nn.Module) -> str:
    """The qualified name of a block's class, or of the one that its fused class was made from."""
    cls = getattr(type(block), "original", type(block)) if isinstance(block, FusedMixin) else type(block)
    return f"{cls.__module__}.{cls.__qualname__}"


def _new_fused(cls: type, plan: str) -> nn.Module:
    fused = fused_class(cls, importlib.import_module(plan))
    return fused.__new__(fused)
