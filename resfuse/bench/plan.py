"""What a run measures, and the time each part of it may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..testing.cases import CASES, FAMILY, PROJECTIONS, RELATIVES, STAGES
from .implementations import COMPILE, EAGER, EAGER_NCHW, RESFUSE
from .workloads import NETWORKS, make

BLOCK_STEP = 0.5  # seconds that an eager step may take; a smaller batch is timed where it would take more
NETWORK_STEP = 5.0
STEPS = 5  # that the fewest rounds of an implementation take, forwards and peak memory included
TRIES = 3  # of a step; the quickest counts, since a busy machine is slow only at times
PROBE_SIZE = 112  # pixels at which a network's step is tried
DEFAULT_FAMILY = ("basic-stage1", "preact-stage1", "stem")


@dataclass(frozen=True)
class Job:
    """One subject in one mode.

    batch: the largest that is timed (`fit` lowers it). memory_batch: that of the saved bytes. gate_batch: that of the
    errors, None for batch. seconds: wanted for its rounds; compile_seconds: expected of torch.compile on two cores.
    """

    subject: str
    mode: str
    batch: int
    memory_batch: int
    implementations: tuple[str, ...]
    seconds: float
    compile_seconds: float = 0.0
    gate_batch: int | None = None


@dataclass(frozen=True)
class Plan:
    """Jobs and the seconds for all of them; fit_batches: lower the batches that are slow here."""

    budget: float
    jobs: tuple[Job, ...]
    fit_batches: bool = True


def plan(device: torch.device | str, extent: str = "default", budget: float | None = None) -> Plan:
    """extent: "quick" (two stages, no torch.compile), "default", or "full" (the whole family, compiled too).

    The last stages are small at a small batch, and are measured at a larger one besides. torch.compile is slow to
    compile on few cores: by default it meets stage 1 and ResNet-50 in bfloat16 alone.
    """
    batch = 64 if torch.device(device).type == "cuda" else 8
    quick, full = extent == "quick", extent == "full"
    cases = {
        "quick": (STAGES[0], STAGES[2]),
        "default": (*STAGES, *PROJECTIONS[1:4:2], *(CASES[name] for name in DEFAULT_FAMILY)),
        "full": (*STAGES, *PROJECTIONS, *RELATIVES, *FAMILY),
    }[extent]
    # The networks first: their compilers must find time.
    jobs = [
        network_job("resnet50", "float32", batch, full, nchw=True),
        network_job("resnet50", "autocast-bfloat16", batch, not quick),
    ]
    for mode in ("float32", "autocast-bfloat16"):
        for case in cases:
            compiled = full or (case is STAGES[0] and not quick)
            jobs.append(block_job(case.name, mode, batch, compiled))
        for case, times in zip(STAGES[2:], (2, 4), strict=True) if not quick else ():
            larger = times * batch
            jobs.append(replace(block_job(case.name, mode, larger, False), memory_batch=larger))
        for images in (1, batch, 4 * batch) if not quick else ():
            jobs.append(Job("resnet50-eval", mode, images, images, _names(False), 0.8 * images, gate_batch=1))
    for name in ("resnet18", "densenet121") if full else ():
        jobs += [network_job(name, mode, batch, True) for mode in ("float32", "autocast-bfloat16")]
    return Plan(budget or {"quick": 90.0, "default": 310.0, "full": 4800.0}[extent], tuple(jobs))


def block_job(subject: str, mode: str, batch: int, compiled: bool) -> Job:
    case = CASES[subject]
    rows_an_image = replace(case, batch=1).rows
    enough = -(-16 * case.width // rows_an_image)  # with M >= 16 w, vectors a channel no longer count
    compile_seconds = 20.0 if compiled else 0.0
    return Job(
        subject, mode, batch, max(batch, enough), _names(compiled), 3.0, compile_seconds, gate_batch=min(batch, enough)
    )


def network_job(subject: str, mode: str, batch: int, compiled: bool, nchw: bool = False) -> Job:
    names = _names(compiled)
    if nchw:
        names = (EAGER.name, EAGER_NCHW.name, *names[1:])
    return Job(subject, mode, batch, 8, names, 22.0, 90.0 if compiled else 0.0, gate_batch=2)


def fit(job: Job, device: torch.device | str, clock: Callable[[Callable[[], object]], float]) -> Job:
    """The job with the largest batch, halving from its own, whose eager step keeps within the limit, and with the
    seconds that the fewest rounds of it will take.

    clock(call) gives seconds. One image is tried, a network's at a lower resolution, and scaled up.
    """
    network = NETWORKS.get(job.subject)
    size = min(network.size, PROBE_SIZE) if network else None
    runner = make(job.subject, job.mode, 1, device, size=size).runner(EAGER)
    call = list(runner.passes().values())[-1]
    call()
    step = min(clock(call) for _ in range(TRIES)) * ((network.size / size) ** 2 if network else 1)
    batch = job.batch
    while batch > 1 and batch * step > (NETWORK_STEP if network else BLOCK_STEP):
        batch //= 2
    slow = [name for name in job.implementations if name != RESFUSE.name]
    return replace(
        job,
        batch=batch,
        gate_batch=min(batch, job.gate_batch or batch),
        seconds=max(job.seconds, STEPS * batch * step * len(slow)),
    )


def _names(compiled: bool) -> tuple[str, ...]:
    return (EAGER.name, COMPILE.name, RESFUSE.name) if compiled else (EAGER.name, RESFUSE.name)
