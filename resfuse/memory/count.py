"""What the parts of a model keep for backward, hold during it and make again, counted without data.

The model's eager twin runs once on the meta device: what autograd saves there is what eager keeps, and gives every
block the shape of its input. What fused blocks keep follows from the description of their call (`functions/ops.py`).

Backward's working memory is estimated, as profiles of single blocks have it: the gradients of a block's output and
input, the largest of its convolutions' outputs, and the gradients of its parameters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import calls, lean
from ..functions import ops, run
from ..functions.branches import Inputs, Spec
from ..functions.unit import KEEP, Tensors, Unit
from ..kernels.interface import Reason

# What a multiply-add takes beside a byte moved: some 50e9 a second and 15 GB/s of a few CPU cores, 400e12 and 4 TB/s of
# a GPU's 16-bit units.
MAC_BYTES = {"cpu": 0.3, "cuda": 0.01}


class Step(NamedTuple):
    """A part of a forward as eager runs it: a module that was marked, or, name None, what lies between. Bytes of its
    input, its output, what it keeps and its parameters; shape: of the input; itemsize: of the output; convolved: of a
    stem, its convolution's output."""

    name: str | None
    x: int
    out: int
    kept: int
    parameters: int = 0
    shape: torch.Size | None = None
    itemsize: int = 1
    convolved: int = 0

    @property
    def peak(self) -> int:
        """What eager's backward of it holds at most, what it has kept included."""
        return self.kept + self.x + 2 * self.out + self.parameters


class Uncounted(ValueError):
    """The model's forward does not run on such an input without data; the message says why."""


class Held(NamedTuple):
    """A fused block, in bytes: what it keeps but for x and its mask; of that what leanest drops; the working memory of
    its backward. again, leanest: the time to make out again, and what leanest drops; projects: its shortcut does."""

    x: int
    out: int
    kept: int
    mask: int
    drops: int
    work: int
    again: float
    leanest: float
    projects: bool


def steps(
    model: nn.Module, marked: dict[str, tuple[str, str]], watched: Iterable[str], input_size: Sequence[int]
) -> tuple[list[Step], set[str]]:
    """The parts of a training forward in order, and which of the watched modules are called. marked: names of parts,
    the first and the last module of each. Raises Uncounted."""
    called: set[str] = set()
    try:
        twin = twin_of(model).train().requires_grad_()
        modules, counted = dict(twin.named_modules()), _Counted(twin)
        for name, (first, last) in marked.items():
            counted.mark(name, modules[first], modules[last])
        for name in watched:
            modules[name].register_forward_pre_hook(lambda *_, name=name: called.add(name))
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(counted.keep, lambda t: t):
            twin(without_data(twin, input_size))
    except Exception as error:  # a model may want other inputs, look at its data, or not be copied
        size = "x".join(map(str, input_size))
        raise Uncounted(f"an input of {size} does not run through the model ({error}); see input_size") from error
    return counted.end(), called


class _Counted:
    """The steps of a forward so far."""

    def __init__(self, twin: nn.Module):
        self.steps: list[Step] = []
        self.ignored = {t.untyped_storage()._cdata for t in (*twin.parameters(), *twin.buffers())}
        self.held: dict[int, torch.UntypedStorage] = {}  # as long as addresses are compared with theirs
        self.inside: list[int] = [0]  # what is kept since the last step, and inside each module that is open

    def keep(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in self.ignored and storage._cdata not in self.held:
            self.held[storage._cdata] = storage
            self.inside[-1] += storage.nbytes()
        return t

    def mark(self, name: str, first: nn.Module, last: nn.Module) -> None:
        seen, parameters = {}, sum(p.nbytes for p in last.parameters())

        def enter(_, inputs):
            seen.update(x=inputs[0], convolved=0)
            self.inside.append(0)

        def convolve(_, __, out):
            seen.update(convolved=out.nbytes)

        def leave(_, __, out):
            kept, x = self.inside.pop(), seen["x"]
            if len(self.inside) == 1:
                self.end()
            sizes = x.nbytes, out.nbytes, kept, parameters
            self.steps.append(Step(name, *sizes, x.shape, out.itemsize, seen["convolved"]))

        first.register_forward_pre_hook(enter)
        if first is not last:
            first.register_forward_hook(convolve)
        last.register_forward_hook(leave)

    def end(self) -> list[Step]:
        if self.inside[0] > 0:
            self.steps.append(Step(None, 0, 0, self.inside[0]))
            self.inside[0] = 0
        return self.steps


@contextmanager
def trained(model: nn.Module) -> Iterator[None]:
    """Inside, a model in evaluation is in training; of one in training what is not stays so."""
    modules = [] if model.training else [module for module in model.modules() if not module.training]
    for module in modules:
        module.training = True
    try:
        yield
    finally:
        for module in modules:
            module.training = False


def without_data(model: nn.Module, size: Sequence[int]) -> Tensor:
    """An input of the model's dtype on the meta device."""
    dtype = next((t.dtype for t in model.parameters() if t.is_floating_point()), torch.float32)
    return torch.empty(tuple(size), dtype=dtype, device="meta")


def twin_of(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device, without hooks; what is fused runs its original forward there."""
    tensors = (*model.parameters(), *model.buffers())
    empty = {id(t): torch.empty_like(t, device="meta", requires_grad=t.requires_grad) for t in tensors}
    twin = copy.deepcopy(model, empty)
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return twin


def held(module: nn.Module, plan, step: Step) -> Held | None:
    """What a fused block keeps for such an input; None where a run cannot hold it."""
    block = plan.as_block(module, torch.empty(step.shape, device="meta"))  # where nothing is drawn
    if isinstance(block, Reason):
        return None
    weight = block.convs[0].weight
    x = lean.promised(step.shape, weight.dtype, weight.device, torch.channels_last)
    try:
        with torch.enable_grad():
            spec, inputs = calls.described(
                [x], weight.dtype, block.bn, block.convs, block.shortcut, relu=block.relu, scale=block.scale,
                row_scale=None, gate=None, stats=None, want_stats=False, backend="auto",
            )  # fmt: skip
    except ValueError:  # a call that does not fit, for which the original forward runs or raises
        return None
    made = ops.describe_block(spec, inputs.flat())
    shorter = lean.without_wide(spec, inputs)
    first = _bytes(made.saved.zs[:1]) if run.drops_first(shorter, inputs) else 0
    kept, mask = _bytes(made.saved._replace(mask=None)), _bytes(made.saved.mask)
    wide = kept - _bytes(ops.describe_block(shorter, inputs.flat()).saved._replace(mask=None))
    sizes = [_bytes(z) for z in made.saved.zs]
    work = step.x + step.out + max(sizes, default=0) + sum(p.nbytes for p in module.parameters())
    work += step.x * (spec.norm is not None) + step.out // 2 * (spec.shortcut.unit is not None)
    each = mac_bytes(weight)
    rows = step.out // (weight.element_size() * block.convs[-1].weight.shape[0])
    # The last 1x1 and the projection, unless their outputs are kept; then only the sum is left.
    macs = sum(t.weight.numel() for unit, t in _outer(spec, inputs) if unit.form != KEEP)
    again = macs * rows * each + step.x + step.out + sum(sizes[-1:])
    macs = sum(t.weight.numel() for unit, t in _outer(spec, inputs) if lean.is_wide(unit, t)) * 2 * rows
    if first:
        macs += first // weight.element_size() * weight[0].numel()
    leanest = macs * each + (first + step.x) * (first > 0)
    return Held(step.x, step.out, kept, mask, first + wide, work, again, leanest, block.projects)


def mac_bytes(weight: Tensor) -> float:
    """What a multiply-add takes where the weight is, in bytes moved."""
    return MAC_BYTES.get(weight.device.type, MAC_BYTES["cuda"])


def _outer(spec: Spec, inputs: Inputs) -> list[tuple[Unit, Tensors]]:
    """What a block's sum is made of."""
    beside = [] if spec.shortcut.unit is None else [(spec.shortcut.unit, inputs.shortcut[0])]
    return [(spec.units[-1], inputs.units[-1]), *beside]


def _bytes(tree) -> int:
    """Of what is promised."""
    return sum(math.prod(shape.size) * shape.dtype.itemsize for shape in ops.leaves(tree))
