"""How the seconds of a run are shared among its jobs."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..kernels.interface import Reason
from .plan import Job

MEASURING = 0.85  # share of the time left that goes to rounds and compilers; the rest makes and profiles models
GENEROUS = 3.0  # times the seconds that a job wants, at most, where there is plenty


@dataclass
class Budget:
    """Seconds, counted from its making. `pace`: 1, or the last compilation's time over what was planned for it where
    that is less than half: then a cache is warm. Otherwise a block's compilation tells little of a network's.

    `rest` below: the jobs that are still to be measured, the present one first. Compilations are served before rounds,
    short ones before long ones, as long as that leaves the rounds half of what they want.
    """

    seconds: float
    pace: float = 1.0

    def __post_init__(self):
        self.began = time.perf_counter()

    @property
    def used(self) -> float:
        return time.perf_counter() - self.began

    @property
    def left(self) -> float:
        return max(0.0, self.seconds - self.used)

    def compile_time(self, rest: Sequence[Job]) -> float | Reason:
        """Seconds in which the present job may compile, or why it may not."""
        planned = rest[0].compile_seconds
        expected = self.pace * planned
        spare = self._spare(rest) - sum(self.pace * job.compile_seconds for job in self._shorter(rest))
        if expected <= spare:
            return min(spare, 2 * max(expected, planned))  # the last one may have met a full cache
        enough = 10 * math.ceil((self.seconds + (expected - spare) / MEASURING) / 10)
        return Reason(
            "compile_budget",
            f"torch.compile was expected to take {expected:.0f} s, more than was left; --budget {enough} leaves room",
        )

    def compiled(self, job: Job, seconds: float) -> None:
        pace = seconds / job.compile_seconds
        self.pace = pace if pace < 0.5 else 1.0

    def rounds_time(self, rest: Sequence[Job]) -> float:
        """Seconds for the present job's rounds."""
        reserved, spare = 0.0, self._spare(rest)
        for job in sorted(rest[1:], key=lambda job: job.compile_seconds):
            if reserved + self.pace * job.compile_seconds <= spare:
                reserved += self.pace * job.compile_seconds
        share = rest[0].seconds / sum(job.seconds for job in rest)
        return min(GENEROUS * rest[0].seconds, max(1.0, share * (MEASURING * self.left - reserved)))

    def _spare(self, rest: Sequence[Job]) -> float:
        """What compilers may take."""
        return MEASURING * self.left - sum(job.seconds for job in rest) / 2

    def _shorter(self, rest: Sequence[Job]) -> list[Job]:
        return [job for job in rest[1:] if job.compile_seconds < rest[0].compile_seconds]
