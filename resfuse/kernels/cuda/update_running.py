"""update_running: momentum, unbiased variance and counters of a block's BatchNorms (`csrc/cuda/finalize.cu`)."""

from collections.abc import Sequence

import torch

from ..interface import Reason, RunningUpdate, Unsupported
from ._operands import vector
from ._ops import ops


def update_running(updates: Sequence[RunningUpdate]) -> None:
    for update in updates:
        for name, dtype in (("running_mean", torch.float32), ("running_var", torch.float32),
                            ("num_batches_tracked", torch.int64)):
            t = getattr(update, name)
            if t is not None and not (t.dtype == dtype and t.is_contiguous()):
                raise Unsupported([Reason("vector", f"{name} is {t.dtype}, not contiguous {dtype}")])
    for stats, *rest in updates:
        ops().update_running(*map(vector, stats), *rest)
