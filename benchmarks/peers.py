"""resfuse beside the alternatives: python -m benchmarks.peers [--subject resnet50] [--mode float32] [--counts]

Kept bytes, peaks at two batches, the largest batch that a memory holds by them, and, without --counts, the time of a
step, all in turn. --table FILE prints docs/benchmarking.md's table. Counts do not depend on how fast a machine is.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from resfuse.bench import measure
from resfuse.bench.alternatives import ALTERNATIVES
from resfuse.bench.plan import Job
from resfuse.bench.results import write_json
from resfuse.bench.workloads import make
from resfuse.testing.comparison import MODES
from resfuse.testing.environment import environment

GIB = 2**30
MEMORIES = (16, 80)  # GiB
COPIES = 2  # of the parameters, held through a step: themselves and SGD's momentum
HEAD = ("| | kept | of eager's | peak of a step | of eager's | eager / it, time |", "|---|---|---|---|---|---|")


def counts(subject: str, mode: str, batches: Sequence[int], device: torch.device, names: Sequence[str]) -> list[dict]:
    """A row of each alternative: bytes kept at the larger batch, peaks by batch, or the reason why there is nothing."""
    rows = []
    for alternative in (a for a in ALTERNATIVES if a.name in names):
        row = {"name": alternative.name, "layout": alternative.implementation.layout, "reason": None, "peaks": {}}
        reason = alternative.absent(device, MODES[mode])
        for batch in batches if reason is None else ():
            workload = make(subject, mode, batch, device)
            _, memory, notes = measure.prepare(workload, {alternative.name: alternative.implementation})
            if notes:
                reason = notes[0].code, notes[0].text
                break
            row["peaks"][batch], row["saved_bytes"] = memory[0].peak_bytes, memory[0].saved_bytes
            torch.compiler.reset()
            measure.release(device)
        row["reason"] = reason and ": ".join(reason)
        print(row["name"], row["reason"] or row["peaks"], flush=True)
        rows.append(row)
    return rows


def times(
    subject: str, mode: str, batch: int, device: torch.device, names: Sequence[str], seconds: float
) -> list[dict]:
    """Of each alternative that runs, all warm at once and in turn; speed against eager's faster layout."""
    chosen = {
        a.name: a.implementation for a in ALTERNATIVES if a.name in names and a.absent(device, MODES[mode]) is None
    }  # fmt: skip
    workload = make(subject, mode, batch, device)
    runners, _, notes = measure.prepare(workload, chosen)
    for note in notes:
        print(note.implementation, note.code, note.text)
    job = Job(subject, mode, batch, batch, tuple(chosen), seconds)
    rows = measure.times(job, chosen, runners, seconds, device)
    return [
        {"name": row.implementation, "seconds": row.seconds._asdict(),
         "speedup": row.speedup and row.speedup._asdict()}
        for row in rows if row.passes == "forward+backward"
    ]  # fmt: skip


def largest_batch(peaks: dict[int, int], held: int, memory: int) -> int:
    """How many images fit into `memory` bytes beside `held` ones, where a peak grows with each image as it did between
    two batches."""
    (small, low), (large, high) = sorted((int(batch), peak) for batch, peak in peaks.items())
    each = (high - low) / (large - small)
    return max(0, int((memory - held - (low - each * small)) / each))


def table(results: dict) -> list[str]:
    memories = " | ".join(f"batch in {gib} GiB" for gib in MEMORIES)
    lines = [f"{HEAD[0]} {memories} |", HEAD[1] + "---|" * len(MEMORIES)]
    batch = max(results["batches"])
    eager = next(row for row in results["rows"] if row["name"] == "eager")
    speeds = {row["name"]: _speed(row["speedup"]) for row in results.get("times", ())}
    for row in results["rows"]:
        if row["reason"]:
            lines.append(f"| {row['name']} | {row['reason']} |{' |' * (4 + len(MEMORIES))}")
            continue
        kept, peak = row["saved_bytes"], row["peaks"][str(batch)]
        fit = [str(largest_batch(row["peaks"], results["held_bytes"], gib * GIB)) for gib in MEMORIES]
        lines.append(
            f"| {row['name']} | {kept / 2**20:.0f} MiB | {kept / eager['saved_bytes']:.2f}x | {peak / 2**20:.0f} MiB | "
            f"{peak / eager['peaks'][str(batch)]:.2f}x | {speeds.get(row['name'], '')} | {' | '.join(fit)} |"
        )
    return lines


def _speed(found: dict | None) -> str:
    return "1" if found is None else f"{found['median']:.2f}x ({found['low']:.2f}-{found['high']:.2f})"


def main(arguments: Sequence[str] | None = None) -> int:
    known = [a.name for a in ALTERNATIVES]
    parser = argparse.ArgumentParser(description="resfuse beside the alternatives.")
    parser.add_argument("--subject", default="resnet50")
    parser.add_argument("--mode", choices=MODES, default="float32")
    parser.add_argument("--batches", default="4,8", help="two, for the counts; the larger is timed (default: 4,8)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--names", default=";".join(known), help=f"of {'; '.join(known)}")
    parser.add_argument("--seconds", type=float, default=60.0, help="for the rounds (default: 60)")
    parser.add_argument("--counts", action="store_true", help="no times")
    parser.add_argument("--out", type=Path, default=Path("resfuse-peers.json"))
    parser.add_argument("--table", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.table:
        print("\n".join(table(json.loads(options.table.read_text()))))
        return 0
    names, batches = options.names.split(";"), [int(batch) for batch in options.batches.split(",")]
    held = COPIES * sum(p.nbytes for p in make(options.subject, options.mode, 1).model.parameters())
    given = sys.argv[1:] if arguments is None else arguments
    kept = (a for before, a in zip(("", *given), given, strict=False) if "--out" not in (before, a))
    results = {
        "command": " ".join(["python -m benchmarks.peers", *map(shlex.quote, kept)]),
        "environment": environment(options.device),
        "subject": options.subject, "mode": options.mode, "batches": batches, "held_bytes": held,
        "rows": counts(options.subject, options.mode, batches, options.device, names),
    }  # fmt: skip
    if not options.counts:
        results["times"] = times(
            options.subject, options.mode, max(batches), options.device, names, options.seconds
        )  # fmt: skip
    write_json(options.out, results)
    print("\n".join(table(json.loads(options.out.read_text()))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
