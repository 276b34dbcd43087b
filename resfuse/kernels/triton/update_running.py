"""update_running: momentum, unbiased variance and counters of a block's BatchNorms, in one launch.

    running = (1 - f) * running + f * batch,  f = momentum or 1 / num_batches_tracked
"""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..interface import RunningUpdate
from ._launch import launch
from ._operands import vector


class UpdateArgs(NamedTuple):
    """mean, var, running_mean, running_var [C]; tracked int64; bessel count / (count - 1)."""

    mean: Tensor
    var: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    tracked: Tensor | None
    momentum: float | None
    bessel: float
    channels: int


@triton.jit
def _towards(buffer, target, factor, inside):
    """(1 - factor) * buffer + factor * target, stored."""
    value = tl.load(buffer, mask=inside).to(tl.float32)
    tl.store(buffer, (value * (1 - factor) + target * factor).to(buffer.dtype.element_ty), mask=inside)


@triton.jit
def _update_running(updates, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    # A program for each BatchNorm, of one warp: no other could read the counter after it is written.
    for i in tl.static_range(COUNT):
        if tl.program_id(0) == i:
            u = updates[i]
            factor = 0.0  # torch: a cumulative average without a counter stands still
            if u.tracked is not None:
                steps = tl.load(u.tracked) + 1
                tl.store(u.tracked, steps)
                factor = 1 / steps.to(tl.float32)
            if u.momentum is not None:
                factor = u.momentum
            for first in range(0, u.channels, BLOCK):
                cols = first + tl.arange(0, BLOCK)
                inside = cols < u.channels
                if u.running_mean is not None:
                    _towards(u.running_mean + cols, tl.load(u.mean + cols, mask=inside), factor, inside)
                if u.running_var is not None:
                    var = tl.load(u.var + cols, mask=inside) * u.bessel
                    _towards(u.running_var + cols, var, factor, inside)


def update_running(updates: Sequence[RunningUpdate]) -> None:
    if not updates:
        return
    args = tuple(
        UpdateArgs(
            *map(vector, (*stats, *buffers)), tracked, momentum, count / (count - 1), stats.mean.shape[0]
        )
        for stats, count, *buffers, tracked, momentum in updates
    )
    launch(_update_running, len(args), updates[0].stats.mean, args, COUNT=len(args), BLOCK=256, num_warps=1)
    for update, done in zip(updates, args, strict=True):
        for name in ("running_mean", "running_var"):
            buffer, value = getattr(update, name), getattr(done, name)
            if value is not buffer:  # a buffer that is a strided view
                buffer.copy_(value)
