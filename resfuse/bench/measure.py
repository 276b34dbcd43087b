"""Memory and time of one job: the functions that `bench` and benchmarks/gpu.py share."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from statistics import median

import torch

import resfuse

from ..testing.memory import peak_bytes, saved_bytes
from ..testing.timing import interleave, ratio, summary
from .implementations import BASELINES, Implementation
from .plan import Job
from .results import MemoryRow, NoteRow, TimeRow
from .workloads import Runner, Workload, make

ROUNDS = 31


def prepare(
    workload: Workload, implementations: Mapping[str, Implementation]
) -> tuple[dict[str, Runner], list[MemoryRow], list[NoteRow]]:
    """Every implementation that runs: its runner, warm, with its memory; a note for what fails or does not fuse."""
    runners, rows, notes = {}, [], []
    where = workload.subject, workload.mode_name
    for name, implementation in implementations.items():
        try:
            runner = workload.runner(implementation)
            if implementation.compiled:
                runner.step()  # compilation is no part of the peak
            if workload.model.training:
                rows.append(memory_row(workload, name, implementation.layout, runner, peak=True))
            else:
                runner.no_grad()
        except Exception as error:  # an implementation that fails is a result of the run, told in its place
            code = "compile_failed" if implementation.compiled else "failed"
            text = (str(error).strip().splitlines() or [""])[0]
            notes.append(NoteRow(*where, name, code, f"{type(error).__name__}: {text}"))
            continue
        runners[name] = runner
        if name.startswith("resfuse"):
            notes += [NoteRow(*where, name, code, text) for code, text in _not_fused(runner)]
    return runners, rows, notes


def memory_row(workload: Workload, name: str, layout: str, runner: Runner, peak: bool) -> MemoryRow:
    """Saved bytes of a forward and, if asked for, the peak of a step."""
    saved = saved_bytes(runner.forward, runner.model, [runner.x] if runner.is_block else [])
    return MemoryRow(
        workload.subject,
        workload.mode_name,
        name,
        layout,
        len(workload.x),
        saved,
        saved / workload.unit_bytes if workload.unit_bytes else None,
        peak_bytes(runner.step, runner.x.device) if peak else None,
    )


def saved_only(
    job: Job, implementations: Mapping[str, Implementation], device: torch.device | str
) -> list[MemoryRow]:
    """Rows at the job's memory batch, for what needs no compilation. A model in evaluation keeps nothing: no rows."""
    workload = make(job.subject, job.mode, job.memory_batch, device)
    rows = []
    if not workload.model.training:
        return rows
    for name, implementation in implementations.items():
        if not implementation.compiled:
            rows.append(memory_row(workload, name, implementation.layout, workload.runner(implementation), False))
            release(device)
    return rows


def times(
    job: Job,
    implementations: Mapping[str, Implementation],
    runners: Mapping[str, Runner],
    budget: float,
    device: torch.device | str,
    progress: Callable[[float], None] = lambda share: None,
) -> list[TimeRow]:
    """Every pass of every warm runner, interleaved within `budget` seconds; no rows without a baseline among them."""
    baselines = [name for name in runners if name in BASELINES]
    if not baselines:
        return []
    calls = {(name, passes): call for name, runner in runners.items() for passes, call in runner.passes().items()}
    warmup = 2  # rounds: in the second, steps are noted
    seconds = interleave(calls, budget=budget, maximum=ROUNDS, warmup=warmup, device=device, progress=progress)
    rows = []
    for passes in dict.fromkeys(passes for _, passes in calls):
        baseline = min(baselines, key=lambda name: median(seconds[name, passes]))
        for name in runners:
            own = seconds[name, passes]
            speedup = None if name == baseline else ratio(seconds[baseline, passes], own)
            layout = implementations[name].layout
            rows.append(
                TimeRow(
                    job.subject, job.mode, name, layout, job.batch, passes, summary(own), job.batch / median(own),
                    baseline, speedup,
                )
            )
    return rows


def release(device: torch.device | str) -> None:
    """Give back what dropped models held, so that the next one starts alike."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def _not_fused(runner: Runner) -> list[tuple[str, str]]:
    report = resfuse.report(runner.model)
    if not report.fused:
        return [("nothing_fused", "no block was fused; this is eager")]
    return [(code, f"{fqn or 'the block'} ran the original forward: {text}") for fqn, code, text, _ in report.fallbacks]
