"""What the Triton kernels are compiled to, and the bytes that a block's step moves, without a GPU:
python -m benchmarks.kernels [--out FILE] writes results, python -m benchmarks.kernels --table FILE prints the tables of
docs/triton.md from them.

Bytes are those of every launch's operands, each once; the vendor's 3x3, forward and two gradients, is counted as six
narrow tensors. A unit is one narrow tensor of the block.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from resfuse.bench.results import write_json
from resfuse.testing.cases import STAGES
from resfuse.testing.environment import environment

ARCHITECTURES = (80, 89, 90, 100)
BATCH = 256  # of the traffic
UNITS = ("wgmma", "tcgen05", "mma.sync")
VENDOR = 6  # narrow tensors
EAGER = 138  # narrow tensors of an eager step, 54 forward and 84 backward
COPY = 4.3e12  # bytes a second, read and written: a device-to-device copy on an H200
SMALL = 2**20  # bytes: launches below this are C-length work
HEADS = (
    ("| kernel | tile | warps | registers | shared KiB | blocks | products |", "|---|---|---|---|---|---|---|"),
    ("| block, batch 256 | launches | narrow tensors moved | eager's | at a copy's rate | eager's |",
     "|---|---|---|---|---|---|"),
)


def measure() -> dict:
    from resfuse.testing.triton.steps import FULL_SIZE, compile_steps

    kernels, traffic = [], []
    for arch in ARCHITECTURES:
        compiled = compile_steps(arch, torch.bfloat16, FULL_SIZE).kernels.values()
        kernels += [{**asdict(k), "tile": k.tile, "blocks": k.blocks} for k in compiled]
        print(f"sm_{arch}: {len(compiled)} kernels", flush=True)
    for case in STAGES:
        launches = compile_steps(90, torch.bfloat16, [case.name], batch=BATCH).launches
        unit = BATCH * case.unit_bytes(2) // case.batch
        traffic.append({"case": case.name, "batch": BATCH, "unit": unit, "launches": launches})
    return {"kernels": kernels, "traffic": traffic}


def kernel_table(results: dict, arch: int = 90) -> list[str]:
    """A line for each kernel and tile of an architecture, over its variants."""
    groups: dict[tuple, list[dict]] = {}
    for row in results["kernels"]:
        if row["arch"] == arch:
            groups.setdefault((row["name"].removeprefix("_"), tuple(row["tile"])), []).append(row)
    lines = list(HEADS[0])
    for (name, tile), rows in sorted(groups.items()):
        registers = sorted({row["registers"] for row in rows})
        shared, blocks = (sorted({row[key] for row in rows}) for key in ("shared", "blocks"))
        unit = next((unit for unit in UNITS if unit in rows[0]["instructions"]), "-")
        lines.append(
            f"| `{name}` | {' x '.join(map(str, tile))} | {rows[0]['warps']} | {_span(registers)} | "
            f"{_span([round(s / 1024) for s in shared])} | {_span(blocks)} | {unit} |"
        )
    return lines


def traffic_table(results: dict) -> list[str]:
    """A line for each stage's identity block: units moved, and the time that takes at a copy's rate."""
    lines = list(HEADS[1])
    for row in results["traffic"]:
        moved = sum(size for _, size in row["launches"]) / row["unit"] + VENDOR
        large = sum(size >= SMALL for _, size in row["launches"])
        ours, eager = (f"{1e3 * units * row['unit'] / COPY:.2f} ms" for units in (moved, EAGER))
        lines.append(
            f"| {row['case']} | {len(row['launches'])}, {large} of them large | {moved:.1f} | {EAGER} | "
            f"{ours} | {eager} |"
        )
    return lines


def _span(values: list[int]) -> str:
    return str(values[0]) if values[0] == values[-1] else f"{values[0]}-{values[-1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compiled Triton kernels and their traffic.")
    parser.add_argument("--out", type=Path, default=Path("resfuse-kernels.json"))
    parser.add_argument("--table", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.table:
        results = json.loads(options.table.read_text())
        print("\n".join([*kernel_table(results), "", *traffic_table(results)]))
        return 0
    write_json(options.out, {"command": "python -m benchmarks.kernels", "environment": environment(), **measure()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
