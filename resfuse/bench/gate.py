"""The correctness gate: errors against float64, beside eager's own, on the models that are then timed.

A handful of seeds decides where it passes; where it does not, the rule's full number is drawn and judged. Blocks are
judged without kinks, by their medians; a network has kinks, and fails where every one of its seeds does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from ..testing.cases import CASES
from ..testing.comparison import MODES, compare
from ..testing.tolerances import allowed, passes, relative_error, within_median
from .implementations import EAGER, Implementation
from .results import ErrorRow
from .workloads import Runner, Workload, make

BLOCK_SEEDS = (3, 10)  # first, and at most
NETWORK_SEEDS = (1, 3)
Errors = dict[str, tuple[list[float], list[float]]]  # result: (eager's, ours), one a seed


def judge(
    subject: str, mode: str, batch: int, implementation: Implementation, device: torch.device | str = "cpu"
) -> list[ErrorRow]:
    """One row for each result shown, `passed` by the tolerance rule.

    Every result is judged, float32 variances apart (their bound needs their condition: the tests have it). Shown are
    `out`, `dx` and the parameter gradient and running statistic nearest to their limits; a network's logits and its
    gradient as one vector.
    """
    errors: Errors = {}
    dtype = MODES[mode].compute
    first, most = NETWORK_SEEDS if subject not in CASES else BLOCK_SEEDS
    _draw(errors, subject, mode, batch, implementation, device, range(first))
    if not all(within_median(ours, eager, dtype) for eager, ours in errors.values()):
        _draw(errors, subject, mode, batch, implementation, device, range(first, most))

    def row(name: str) -> ErrorRow:
        eager, ours = errors[name]
        limit = allowed(median(eager), dtype)
        passed = passes(ours, eager, dtype, kinks=subject not in CASES)
        return ErrorRow(
            subject, mode, implementation.name, batch, name, len(ours), median(eager), median(ours), limit, passed
        )

    rows = {name: row(name) for name in errors}
    failed = [name for name in rows if not rows[name].passed]
    shown = [*(n for n in ("out", "dx", "logits", "gradient") if n in rows), *_nearest_limits(rows), *failed]
    return [rows[name] for name in dict.fromkeys(shown)]


def _draw(
    errors: Errors,
    subject: str,
    mode: str,
    batch: int,
    implementation: Implementation,
    device: torch.device | str,
    seeds: Iterable[int],
) -> None:
    for seed in seeds:
        workload = make(subject, mode, batch, device, seed, kinks=False)
        if workload.is_block:
            found = compare(workload.model, workload.x, workload.target, implementation.prepare, workload.mode)
        else:
            found = _compare_networks(workload, implementation)
        for name, (eager, ours) in found.items():
            if not (workload.mode.compute == torch.float32 and name.endswith("running_var")):
                entry = errors.setdefault(name, ([], []))
                entry[0].append(eager)
                entry[1].append(ours)


def _compare_networks(workload: Workload, implementation: Implementation) -> dict[str, tuple[float, float]]:
    twin = copy.deepcopy(workload.model).double()
    reference = _results(Runner(twin, workload.x.double(), workload.target, None, False))
    eager = _results(workload.runner(EAGER))
    ours = _results(workload.runner(implementation))
    return {name: (relative_error(eager[name], r), relative_error(ours[name], r)) for name, r in reference.items()}


def _results(runner: Runner) -> dict[str, Tensor]:
    logits = runner.output()
    wide = logits if logits.dtype == torch.float64 else logits.float()
    gradients = runner.gradients(F.cross_entropy(wide, runner.target))
    return {"logits": logits.detach(), "gradient": torch.cat([g.flatten().double() for g in gradients])}


def _nearest_limits(rows: dict[str, ErrorRow]) -> list[str]:
    """The parameter gradient and the running statistic that come nearest to their limits.

    Gradients that are 0 but for rounding (a shift that a BatchNorm takes out again) are judged, not shown: an error
    relative to next to nothing tells a reader nothing.
    """
    groups = (
        [n for n in rows if n.startswith("d") and n != "dx" and "running" not in n and rows[n].eager < 1],
        [n for n in rows if "running" in n],
    )
    return [max(group, key=lambda name: rows[name].ours / rows[name].allowed) for group in groups if group]
