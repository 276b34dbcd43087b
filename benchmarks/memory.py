"""What a training step keeps for backward, by family: python -m benchmarks.memory [--out FILE] writes results,
python -m benchmarks.memory --table FILE prints docs/memory.md's table from them.

Bytes of unique storages that autograd keeps between forward and backward, parameters and buffers left out: a count, the
same on every machine. Batch 8, 224 px, channels_last.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import torch

import resfuse
from resfuse.bench.results import write_json
from resfuse.bench.workloads import TORCHVISION, make
from resfuse.testing.cases import FAMILY, PROJECTIONS, STAGES
from resfuse.testing.environment import environment
from resfuse.testing.memory import saved_bytes

MODES = ("float32", "autocast-bfloat16")
BATCH = 8
BLOCKS = (STAGES[0], PROJECTIONS[1], *FAMILY)
HEAD = ("| | float32 | bf16 autocast |", "|---|---|---|")


def measure(subject: str, mode: str) -> dict:
    workload = make(subject, mode, BATCH)
    found = {}
    for name, model in (("eager", workload.model), ("resfuse", resfuse.fuse(copy.deepcopy(workload.model)))):
        x = workload.x.detach().requires_grad_(workload.is_block)
        with torch.autocast("cpu", dtype=workload.mode.autocast, enabled=workload.mode.autocast is not None):
            found[name] = saved_bytes(lambda m=model, x=x: m(x), model, [x] if workload.is_block else [])
    return {"subject": subject, "mode": mode, "batch": BATCH, **found}


def table(results: dict) -> list[str]:
    """A line per subject: what resfuse keeps as a share of eager's, and both in MiB."""
    lines = list(HEAD)
    for subject in dict.fromkeys(row["subject"] for row in results["memory"]):
        rows = {row["mode"]: row for row in results["memory"] if row["subject"] == subject}
        cells = (
            f"**{row['resfuse'] / row['eager']:.3f}x** ({row['eager'] / 2**20:.1f} to {row['resfuse'] / 2**20:.1f} MiB)"
            for row in (rows[mode] for mode in MODES)
        )
        lines.append(f"| {subject} | {' | '.join(cells)} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description="Saved bytes by family.")
    parser.add_argument("--out", type=Path, default=Path("resfuse-memory.json"))
    parser.add_argument("--table", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.table:
        print("\n".join(table(json.loads(options.table.read_text()))))
        return 0
    rows = []
    for subject in (*TORCHVISION, *(case.name for case in BLOCKS)):
        for mode in MODES:
            rows.append(measure(subject, mode))
            print(subject, mode, f"{rows[-1]['resfuse'] / rows[-1]['eager']:.3f}", flush=True)
    write_json(options.out, {"command": "python -m benchmarks.memory", "environment": environment(), "memory": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
