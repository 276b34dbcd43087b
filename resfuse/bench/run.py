"""One run: the correctness gate over every job, then memory and interleaved times, within a budget.

When the gate is red nothing is timed, so that no speed can be reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..kernels.interface import Reason
from ..testing.comparison import MODES
from ..testing.environment import environment
from . import gate, measure
from .budget import Budget
from .implementations import IMPLEMENTATIONS, RESFUSE, Implementation, choice
from .plan import Job, Plan, fit
from .precompile import precompile
from .results import NoteRow, Results
from .workloads import make

SLOW_BFLOAT16 = Reason(
    "no_bfloat16_instructions",
    "bfloat16 times on this device tell how each implementation does without such instructions (eager's convolutions "
    "in particular), not what a device that has them would show",
)
Progress = Callable[[str, float], None]  # what is running now, share of the run that is done


def run(
    plan: Plan,
    command: str,
    device: torch.device | str = "cpu",
    *,
    kind: str = "bench",
    implementations: Mapping[str, Implementation] = IMPLEMENTATIONS,
    compile_apart: bool = True,
    progress: Progress = lambda text, share: None,
    after_job: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Everything in the plan; the gate judges each implementation whose name begins with "resfuse".

    compile_apart: torch.compile compiles in a process that its deadline can stop; False suits machines that compile
    fast. after_job is given the results so far, after the gate and after each job.
    """
    session = _Session(Budget(plan.budget), torch.device(device), implementations, compile_apart, progress)
    session.results = results = Results(kind, command, environment(device))
    results.kernels = {mode: choice(device, MODES[mode].compute) for mode in {job.mode: None for job in plan.jobs}}
    if not results.environment["fast_bfloat16"]:
        slow = [job for job in plan.jobs if MODES[job.mode].compute == torch.bfloat16]
        results.notes += [NoteRow(job.subject, job.mode, "every", *SLOW_BFLOAT16) for job in slow[:1]]
    jobs = []
    for job in plan.jobs:
        session.show(job, "batch size")
        jobs.append(fit(job, device, clock) if plan.fit_batches else job)
    for job in jobs:
        session.judge(job)
    results.gate_passed = all(row.passed for row in results.errors)
    after_job(results)
    for index, job in enumerate(jobs if results.gate_passed else []):
        session.measure(job, jobs[index:])
        results.seconds = session.budget.used
        after_job(results)
    results.seconds = session.budget.used
    return results


def clock(call: Callable[[], object]) -> float:
    """Seconds of one call on the wall; calls that end on a device are waited for."""
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


@dataclass
class _Session:
    budget: Budget
    device: torch.device
    implementations: Mapping[str, Implementation]
    compile_apart: bool
    progress: Progress
    results: Results = field(init=False)
    judged: set[tuple] = field(default_factory=set)

    def show(self, job: Job, text: str) -> None:
        where = f"{job.subject}, {job.mode}, batch {job.batch}"
        self.progress(f"{where}: {text}", min(1.0, self.budget.used / self.budget.seconds))

    def judge(self, job: Job) -> None:
        for name in job.implementations:
            key = job.subject, job.mode, job.gate_batch or job.batch, name
            if name.startswith(RESFUSE.name) and key not in self.judged:
                self.judged.add(key)  # once, however many batches are timed
                self.show(job, "error against float64")
                self.results.errors += gate.judge(
                    job.subject, job.mode, job.gate_batch or job.batch, self.implementations[name], self.device
                )

    def measure(self, job: Job, rest: Sequence[Job]) -> None:
        """Memory, then times. rest: the jobs still to be measured, this one first."""
        chosen = {name: self.implementations[name] for name in job.implementations}
        if job.memory_batch != job.batch:
            self.show(job, f"saved bytes at batch {job.memory_batch}")
            self.results.memory += measure.saved_only(job, chosen, self.device)
        for name in [name for name, implementation in chosen.items() if implementation.compiled]:
            self.show(job, f"{name} compiles")
            refusal = self._compile(job, name, rest)
            if refusal is not None:
                self.results.notes.append(NoteRow(job.subject, job.mode, name, *refusal))
                del chosen[name]
        self.show(job, "memory")
        workload = make(job.subject, job.mode, job.batch, self.device)
        runners, rows, notes = measure.prepare(workload, chosen)
        self.results.memory += rows
        self.results.notes += notes
        self.results.times += measure.times(
            job, chosen, runners, self.budget.rounds_time(rest), self.device,
            lambda share: self.show(job, f"time, {share:.0%} of its rounds"),
        )
        del runners, workload
        torch.compiler.reset()
        measure.release(self.device)

    def _compile(self, job: Job, name: str, rest: Sequence[Job]) -> Reason | None:
        """Why there is no time to compile, or None."""
        seconds = self.budget.compile_time(rest)
        if isinstance(seconds, Reason) or not self.compile_apart:
            return seconds if isinstance(seconds, Reason) else None
        outcome = precompile(job.subject, job.mode, job.batch, name, self.device, seconds)
        if isinstance(outcome, Reason):
            return outcome
        self.budget.compiled(job, outcome)
        self.results.compile_seconds[f"{job.subject}, {job.mode}, {name}"] = outcome
        return None
