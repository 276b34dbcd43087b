"""One run: the correctness gate over every job, then memory and interleaved times, within a budget.

When the gate is red nothing is timed, so that no speed can be reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..kernels.interface import Reason
from ..testing.comparison import MODES
from ..testing.environment import environment
from . import gate, measure
from .implementations import IMPLEMENTATIONS, RESFUSE, Implementation, choice
from .plan import Job, Plan, fit
from .precompile import precompile
from .results import NoteRow, Results
from .workloads import make

Progress = Callable[[str, float], None]  # what is running now, share of the run that is done


@dataclass
class Budget:
    """Seconds of a run, counted from its making."""

    seconds: float

    def __post_init__(self):
        self.began = time.perf_counter()

    @property
    def used(self) -> float:
        return time.perf_counter() - self.began

    @property
    def left(self) -> float:
        return max(0.0, self.seconds - self.used)


def run(
    plan: Plan,
    command: str,
    device: torch.device | str = "cpu",
    implementations: Mapping[str, Implementation] = IMPLEMENTATIONS,
    progress: Progress = lambda text, share: None,
) -> Results:
    """Everything in the plan; the gate judges each implementation whose name begins with "resfuse"."""
    budget = Budget(plan.budget)
    results = Results("bench", command, environment(device))
    results.kernels = {mode: choice(device, MODES[mode].compute) for mode in {job.mode: None for job in plan.jobs}}
    jobs = []
    for job in plan.jobs:
        progress(f"{job.subject}, {job.mode}: batch size", min(1.0, budget.used / budget.seconds))
        jobs.append(fit(job, device, clock))
    for job in jobs:
        for name in job.implementations:
            if name.startswith(RESFUSE.name):
                progress(f"{job.subject}, {job.mode}: error against float64", min(1.0, budget.used / budget.seconds))
                results.errors += gate.judge(job.subject, job.mode, job.gate_batch, implementations[name], device)
    results.gate_passed = all(row.passed for row in results.errors)
    if results.gate_passed:
        for job in jobs:
            if job.memory_batch != job.batch:
                progress(f"{job.subject}, {job.mode}: saved bytes", min(1.0, budget.used / budget.seconds))
                results.memory += measure.saved_only(job, _of(job, implementations), device)
        for index, job in enumerate(jobs):
            wanted = sum(each.seconds + each.compile_seconds for each in jobs[index:])
            _measure(job, results, implementations, device, budget, budget.left / wanted, progress)
    results.seconds = budget.used
    return results


def clock(call: Callable[[], object]) -> float:
    """Seconds of one call on the wall; calls that end on a device are waited for."""
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _measure(
    job: Job,
    results: Results,
    implementations: Mapping[str, Implementation],
    device: torch.device | str,
    budget: Budget,
    scale: float,
    progress: Progress,
) -> None:
    """Peak and saved bytes at the timed batch, then times, in `scale` times the seconds that the job wants."""
    began, label = budget.used, f"{job.subject}, {job.mode}, batch {job.batch}"

    def show(text: str) -> None:
        progress(f"{label}: {text}", min(1.0, budget.used / budget.seconds))

    chosen = _of(job, implementations)
    for name in [name for name, implementation in chosen.items() if implementation.compiled]:
        show(f"{name} compiles")
        outcome = precompile(job.subject, job.mode, job.batch, name, device, scale * job.compile_seconds)
        if isinstance(outcome, Reason):
            results.notes.append(NoteRow(job.subject, job.mode, name, *outcome))
            del chosen[name]
        else:
            results.compile_seconds[f"{job.subject}, {job.mode}, {name}"] = outcome
    show("memory")
    workload = make(job.subject, job.mode, job.batch, device)
    runners, notes = measure.prepare(workload, job, chosen)
    results.notes += notes
    for name, runner in runners.items():
        results.memory.append(measure.memory_row(workload, name, chosen[name].layout, runner, peak=True))
    show("time")
    # What the compiler left of its share goes to the rounds of the jobs that follow.
    left = min(scale * job.seconds, scale * (job.seconds + job.compile_seconds) - (budget.used - began))
    results.times += measure.times(
        job, chosen, runners, max(left, 1.0), device, lambda share: show(f"time, {share:.0%} of its rounds")
    )
    torch.compiler.reset()
    del runners, workload
    measure.release(device)


def _of(job: Job, implementations: Mapping[str, Implementation]) -> dict[str, Implementation]:
    return {name: implementations[name] for name in job.implementations}
