"""update_running: momentum, unbiased variance and counters of a block's BatchNorms, without a synchronisation.

    running = (1 - f) * running + f * batch,  f = momentum or 1 / num_batches_tracked
"""

from collections.abc import Sequence

import torch

from ..interface import RunningUpdate


def update_running(updates: Sequence[RunningUpdate]) -> None:
    pending = []  # (buffer, value): every allocation comes before the first write
    for stats, count, running_mean, running_var, tracked, momentum in updates:
        factor = momentum
        if tracked is not None:
            steps = tracked + 1
            pending.append((tracked, steps))
            if momentum is None:
                factor = steps.to(stats.mean.dtype).reciprocal()
        if factor is None:
            factor = 0.0  # torch: a cumulative average without a counter stands still
        if running_mean is not None:
            pending.append((running_mean, _towards(running_mean, stats.mean, factor)))
        if running_var is not None:
            pending.append((running_var, _towards(running_var, stats.var * (count / (count - 1)), factor)))
    for buffer, value in pending:
        buffer.copy_(value)


def _towards(buffer: torch.Tensor, target: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    return buffer.to(target.dtype) * (1 - factor) + target * factor
