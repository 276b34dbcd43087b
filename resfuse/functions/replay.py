"""The work of a step without the Python that decides it.

A block's forward comes down to some allocations, operators and kernel launches, which depend on what is static in the
call and on the operands' sizes, strides and dtypes alone. The first call of a kind runs as it is; the second is noted
while it runs (`notes.py`); later ones do what was noted, in a function that is generated from the notes
(`source.py`). The same kernels get the same operands, so results are the same bits; a host spends a fraction of the
time.

A call that reads a tensor which is neither an operand nor made on the way, or a value that a tensor holds, cannot be
noted, and runs as it is for good.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.rounding import reduced_products, rounds_to_tf32
from . import source
from .notes import Notes

DEVICES = ("cpu", "cuda")
MOST = 4096  # kinds of calls that a kernel set's notes are kept of, some 3 KB each
SEEN, NEVER = "seen", "never"


def run(
    k: SimpleNamespace, step: str, spec: NamedTuple | None, tensors: Sequence[Tensor | None],
    call: Callable[[], object], *more: Hashable,
):
    """What `call` gives, whose operands are `tensors`: all that it reads or writes and does not make itself.

    k: the kernels that it runs, which keep the notes; step, spec (but for what is its caller's: running, pending and
    steps) and more: everything else that it depends on.
    """
    first = tensors[0]
    if first.device.type not in DEVICES or torch._C._len_torch_dispatch_stack() > 0:
        return call()
    if spec is not None and spec.group is not None:  # no collectives in notes
        return call()
    found = [None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() & 15) for t in tensors]
    static = spec and spec._replace(running=None, pending=None, steps=None)
    rounded = rounds_to_tf32(first), reduced_products(first.device)
    key = (step, static, more, first.device.index, rounded, _repeated(tensors), *found)
    steps = k.replays.get(key)
    if steps is None:
        if len(k.replays) >= MOST:
            del k.replays[next(iter(k.replays))]  # the oldest
        k.replays[key] = SEEN
        return call()
    if steps is SEEN:
        with Notes(tensors) as notes:
            result = call()
        k.replays[key] = source.steps(notes, result) or NEVER
        return result
    if steps is NEVER:
        return call()
    return _replayed(steps, first.device, tensors)


def _repeated(tensors: Sequence[Tensor | None]) -> tuple[int, ...] | None:
    """Where each operand occurs first, None where all are different: notes know one name for a tensor."""
    present = [id(t) for t in tensors if t is not None]
    if len(set(present)) == len(present):
        return None
    return tuple(map(present.index, present))


def _replayed(steps: Callable, device: torch.device, tensors: Sequence[Tensor | None]):
    """On the operands' device, autocast off, as where the notes were made."""
    kind, stream = device.type, None
    if kind == "cuda":
        if torch._C._cuda_getDevice() != device.index:
            with torch.cuda.device(device):
                return _replayed(steps, device, tensors)
        stream = torch._C._cuda_getCurrentRawStream(device.index)
    if not torch.is_autocast_enabled(kind):
        return steps(stream, *tensors)
    torch.set_autocast_enabled(kind, False)
    try:
        return steps(stream, *tensors)
    finally:
        torch.set_autocast_enabled(kind, True)
