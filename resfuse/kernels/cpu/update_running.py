"""update_running: momentum, unbiased variance and counters of a block's BatchNorms (`csrc/cpu/finalize.cpp`)."""

from collections.abc import Sequence

import torch

from ... import _native
from ..interface import RunningUpdate
from ._operands import check_vectors


def update_running(updates: Sequence[RunningUpdate]) -> None:
    for (mean, var), _, running_mean, running_var, tracked, _ in updates:
        check_vectors(mean=mean, var=var, running_mean=running_mean, running_var=running_var)
        check_vectors(torch.int64, num_batches_tracked=tracked)
    for (mean, var), *rest in updates:
        _native.load().update_running(mean, var, *rest)
