"""What a training step runs, seen without running it: every operator and every kernel launch with its operands.

    ops = record(lambda: torchvision.models.resnet50(), (256, 3, 224, 224), torch.bfloat16, fused=True)

The step runs on fake tensors, which have sizes and no memory, so any batch is recorded in seconds on any machine. The
fused model takes the way that it takes on a GPU: the Triton set's primitives launch as they would, and a launch is
noted instead of made. Nothing here says what a primitive reads: that is seen at its launches and operators.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

import resfuse

from ... import calls
from ...blocks import mixin
from ...blocks.mixin import FusedMixin
from ...kernels import dispatch, measured, vendor
from .operations import primitive_operations

FORWARD, BACKWARD = "forward", "backward"
# Operators that take memory, and write to it or not; the rest that neither read nor write make views.
BLANK = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
FILL = ("zeros", "zeros_like", "new_zeros", "ones_like", "zero_", "fill_", "full", "full_like")
# Operands that the vendors' kernels read twice, by position: BatchNorm's statistics and sums are a pass of their own.
TWICE = {
    "native_batch_norm": (0,), "cudnn_batch_norm": (0,), "native_batch_norm_backward": (0, 1),
    "cudnn_batch_norm_backward": (0, 1),
}  # fmt: skip


class Block(NamedTuple):
    """Where in the model: "stem" before the first block, "head" after the last."""

    name: str
    phase: str


@dataclass(frozen=True)
class Op:
    """An operator or a launch. reads, writes: bytes by storage; twice: storages that its kernels read a second time;
    operations: two for each multiply-add; call: which primitive's call it is part of, None for none."""

    name: str
    block: Block
    reads: dict[int, int]
    writes: dict[int, int]
    twice: frozenset[int]
    operations: int
    call: int | None

    @property
    def bytes(self) -> int:
        again = sum(size for storage, size in self.reads.items() if storage in self.twice)
        return sum(self.reads.values()) + again + sum(self.writes.values())


@dataclass
class Call:
    """A call of a primitive: the storages that there were before it, and those that it gave."""

    primitive: str
    block: Block
    before: int
    given: set[int] = field(default_factory=set)
    operations: int = 0


class Recorder(TorchDispatchMode):
    """Sees operators as a dispatch mode, launches as the Triton set's `Instead`, primitives through `within`."""

    arch = 90

    def __init__(self, blocks: Sequence[str] = ()):
        super().__init__()
        self.ops: list[Op] = []
        self.calls: list[Call] = []
        self.tracker = ModuleTracker()
        self.blocks = set(blocks)
        self.passed: set[str] = set()  # phases in which a block has begun
        self.storages: dict[int, int] = {}  # number by address
        self.held: list[torch.UntypedStorage] = []  # kept, or an address could come again
        self.blank: set[int] = set()  # nothing has been written to them yet
        self.call: int | None = None

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, op._overloadpacket
        name = packet.__name__
        if name == "is_set_to":  # fake tensors say no
            return len({(self.number(t), t.storage_offset(), t.shape, t.stride()) for t in args}) == 1
        result = op(*args, **kwargs)
        operands, results = list(_tensors((args, kwargs))), list(_tensors(result))
        if any(t.device.type == "meta" for t in results):  # somebody asks for a shape
            return result
        if name in BLANK:
            self.blank.update(self.number(t) for t in results)
            return result
        known = {self.number(t) for t in operands}
        written = list(_written(op, args, kwargs))
        made = [t for t in results if self.number(t) not in known]
        if not (written or made):  # a view, or a question
            return result
        reads = [] if name in FILL else [t for t in operands if not (name == "copy_" and t is args[0])]
        twice = [args[i] for i in TWICE.get(name, ())]
        if name == "convolution_backward" and all(args[-1][:2]):
            twice = [args[0]]  # the gradient, by that of the input and by that of the weight
        counted = 0
        if self.call is None and packet in flop_registry:
            counted = flop_registry[packet](*args, **kwargs, out_val=result)
        self.note(name, reads, [*written, *made], twice, counted)
        return result

    def __call__(self, kernel, programs: int, args: tuple, options: dict) -> None:
        reads, writes = [], []
        for t in _tensors(args):  # what nobody has written yet, this one writes
            (writes if self.number(t) in self.blank else reads).append(t)
        self.note(kernel.fn.__name__.lstrip("_"), reads, writes, [], 0)

    @contextmanager
    def within(self, primitive: str, operands: tuple) -> Iterator[Callable[[object], None]]:
        for t in _tensors(operands):
            self.number(t)
        call = Call(primitive, self.block(), len(self.held))
        self.calls.append(call)
        self.call = len(self.calls) - 1

        def gave(result) -> None:
            call.given.update(self.number(t) for t in _tensors(result))
            call.operations = primitive_operations(primitive, operands, result)

        try:
            yield gave
        finally:
            self.call = None

    def note(self, name: str, reads: list[Tensor], writes: list[Tensor], twice: list[Tensor], operations: int) -> None:
        read, wrote = self.sizes(reads), self.sizes(writes)
        self.blank -= set(wrote)
        again = frozenset(self.number(t) for t in twice)
        self.ops.append(Op(name, self.block(), read, wrote, again, operations, self.call))

    def sizes(self, tensors: list[Tensor]) -> dict[int, int]:
        """Bytes by storage: each view counts once, and all views no more than the storage."""
        views = {(self.number(t), t.storage_offset(), t.shape, t.stride()): t for t in tensors}
        found: dict[int, int] = {}
        for (key, *_), t in views.items():
            size = found.get(key, 0) + t.numel() * t.element_size()
            found[key] = min(size, self.held[key].nbytes())
        return found

    def number(self, t: Tensor) -> int:
        storage = t.untyped_storage()
        address = storage._cdata
        if address not in self.storages:
            self.storages[address] = len(self.held)
            self.held.append(storage)
        return self.storages[address]

    def block(self) -> Block:
        phase = BACKWARD if self.tracker.is_bw else FORWARD
        inside = {name.partition(".")[2] for name in self.tracker.parents} & self.blocks
        if inside:
            self.passed.add(phase)
            return Block(min(inside, key=len), phase)
        return Block("stem" if (phase in self.passed) == (phase == BACKWARD) else "head", phase)


def record(
    build: Callable[[], nn.Module], size: Sequence[int], autocast: torch.dtype | None, *, fused: bool, gpu: bool = True
) -> Recorder:
    """One forward of a model in training, on images of that size in channels_last, and one backward.

    autocast: a dtype, or None for float32. gpu: whether a fused model does what it does on a GPU whose tests passed, or
    on this CPU.
    """
    with _fakes(), ExitStack() as stack:
        model = _faked(build).train()
        x = torch.empty(tuple(size)).contiguous(memory_format=torch.channels_last)
        recorder = Recorder(block_names(model))
        if fused:
            stack.enter_context(_as_on_a_gpu(recorder) if gpu else _steps_as_they_are())
            stack.enter_context(dispatch.watched(recorder.within))
            resfuse.fuse(model)
        stack.enter_context(torch.autocast("cpu", dtype=autocast, enabled=autocast is not None))
        stack.enter_context(recorder.tracker)
        stack.enter_context(recorder)
        out = model(x)
        stack.enter_context(torch.autocast("cpu", enabled=False))
        out.backward(torch.empty_like(out))
        refused = [m.resfuse_state.fallbacks for m in model.modules() if isinstance(m, FusedMixin)]
        assert not any(refused), refused
    return recorder


def _faked(build: Callable[[], nn.Module]) -> nn.Module:
    """The model, which is built with values, without them; convolutions' weights in channels_last."""
    with unset_fake_temporarily():
        model = build()
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                layout = torch.channels_last if p.dim() == 4 else torch.contiguous_format
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, memory_format=layout))
        for name, b in module._buffers.items():
            module._buffers[name] = b if b is None else torch.empty(b.shape, dtype=b.dtype)
    return model


def block_names(model: nn.Module) -> list[str]:
    """Names of the outermost modules that `fuse` converts, the model itself left out; none lies in another."""
    modules = resfuse.fuse(model).named_modules()
    names = [name for name, module in modules if name and isinstance(module, FusedMixin)]
    resfuse.unfuse(model)
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


@contextmanager
def _fakes() -> Iterator[None]:
    """Inside, tensors are fake ones, which fused modules take for plain ones."""
    plain = mixin.PLAIN
    mixin.PLAIN = (*plain, FakeTensor)
    try:
        with FakeTensorMode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of modules that are not fused, and of autocast's default dtype
            yield
    finally:
        mixin.PLAIN = plain


@contextmanager
def _steps_as_they_are() -> Iterator[None]:
    """Fused modules run their steps under a dispatch mode's eyes, not as operators, which have fakes of their own."""
    watched = calls._watched
    calls._watched = lambda steps, *parts: steps
    try:
        yield
    finally:
        calls._watched = watched


@contextmanager
def _as_on_a_gpu(recorder: Recorder) -> Iterator[None]:
    """Fused modules choose forms and kernels as on a GPU that Triton's are proven on, and launch into the recorder."""
    from ..triton.runners import instead

    form, proven, widened = calls._covariance_form, measured.proven, vendor._compute_dtype
    calls._covariance_form = lambda in_, out, macs, is_cuda: form(in_, out, macs, True)
    measured.proven = lambda kernel_set, device: kernel_set in ("triton", "eager")
    vendor._compute_dtype = lambda t: t.dtype  # 16-bit convolutions have instructions
    try:
        with _steps_as_they_are(), instead(recorder):
            yield
    finally:
        calls._covariance_form, measured.proven, vendor._compute_dtype = form, proven, widened


def _tensors(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _written(op, args: tuple, kwargs: dict) -> Iterator[Tensor]:
    """Operands that an operator writes to, by its schema."""
    for i, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(args[i] if i < len(args) else kwargs.get(argument.name))
