"""What the pytest-benchmark suites time side by side, from the workloads of `python -m resfuse bench`."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.conftest import Group
from benchmarks.primitives import sets, works
from resfuse.bench import measure
from resfuse.bench.implementations import IMPLEMENTATIONS
from resfuse.bench.workloads import make
from resfuse.testing.cases import CASES


def workload_group(subject: str, mode: str, batch: int, names: Sequence[str], device: torch.device) -> Group:
    """Training steps (evaluations, where the subject says so) of a network or block."""
    workload = make(subject, mode, batch, device)
    runners, memory, notes = measure.prepare(workload, {name: IMPLEMENTATIONS[name] for name in names})
    extra = {name: {"batch": batch, "mode": mode} for name in runners}
    for row in memory:
        extra[row.implementation] |= {"saved_bytes": row.saved_bytes, "peak_bytes": row.peak_bytes}
    calls = {name: list(runner.passes().values())[-1] for name, runner in runners.items()}
    missing = {note.implementation: f"{note.code}: {note.text}" for note in notes}
    return Group(calls, extra, missing)


def primitive_group(case: str, primitive: str, dtype: torch.dtype, batch: int, device: torch.device) -> Group:
    """One primitive of a bottleneck's step, by each kernel set that runs whole blocks."""
    work = works(replace(CASES[case], batch=batch), dtype, device)[primitive]
    kernels = sets(device, dtype)
    extra = {"bytes": work.bytes, "operations": work.operations}
    calls = {name: lambda k=k: work.call(k) for name, k in kernels.items()}
    return Group(calls, {name: extra for name in kernels})
