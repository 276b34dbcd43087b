"""Fused against eager training on scikit-learn's digits: python -m benchmarks.convergence [--out FILE] writes results,
python -m benchmarks.convergence --table FILE prints docs/benchmarking.md's table from them.

Two bottleneck ResNets, of 14 layers and of 110, in float32 and under bfloat16 autocast; several seeds, each trained
eager and fused from the same start on the same batches (`resfuse/bench/verify.py`). Test accuracy is of float32
evaluation. Results do not depend on how fast the machine is.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import torch

from resfuse.bench.results import write_json
from resfuse.bench.verify import curve_distance, verify
from resfuse.testing.environment import environment
from resfuse.testing.models import small_resnet

NETWORKS = {
    "14 layers": partial(small_resnet, planes=(8, 16), blocks=2),
    "110 layers": partial(small_resnet, planes=(8, 16, 32), blocks=12),
}
MODES = {"float32": None, "autocast-bfloat16": torch.bfloat16}
SEEDS, STEPS, LAST = 3, 150, 10
HEAD = (
    "| network | mode | | test accuracy, % | loss of the last steps | fused from eager | seed from seed | "
    "bfloat16 from float32, eager |",
    "|---|---|---|---|---|---|---|---|",
)


def measure(name: str, mode: str, seeds: int, steps: int) -> dict:
    found = verify(range(seeds), steps, make=NETWORKS[name], autocast=MODES[mode])
    curves = {"eager": found.eager, "resfuse": found.fused}
    return {
        "network": name, "mode": mode, "steps": steps, "seeds": seeds, "distance": found.distance,
        "spread": found.spread, "passed": found.passed,
        "accuracy": {"eager": found.eager_accuracy, "resfuse": found.fused_accuracy},
        "loss": {key: [fmean(curve[-LAST:]) for curve in each] for key, each in curves.items()},
        "curves": {key: [[float(f"{loss:.4g}") for loss in curve] for curve in each] for key, each in curves.items()},
    }  # fmt: skip


def table(results: dict) -> list[str]:
    """Mean and standard deviation over seeds; distances of loss curves as `verify` takes them, the largest of the
    seeds, but between seeds the median."""
    lines, exact = list(HEAD), {row["network"]: row for row in results["rows"] if row["mode"] == "float32"}
    for row in results["rows"]:
        for key in ("eager", "resfuse"):
            accuracy, loss = ([scale * v for v in row[k][key]] for k, scale in (("accuracy", 100), ("loss", 1)))
            own, other = (each["curves"]["eager"] for each in (row, exact[row["network"]]))
            rounding = max(curve_distance(a, b) for a, b in zip(own, other, strict=True))
            last = "" if row["mode"] == "float32" else f"{rounding:.3f}"
            distances = ("", "", last) if key == "eager" else (f"{row['distance']:.3f}", f"{row['spread']:.3f}", "")
            lines.append(
                f"| {row['network']} | {row['mode']} | {key} | {fmean(accuracy):.1f} ± {stdev(accuracy):.1f} | "
                f"{fmean(loss):.4f} ± {stdev(loss):.4f} | {' | '.join(distances)} |"
            )
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fused against eager training on digits.")
    parser.add_argument("--out", type=Path, default=Path("resfuse-convergence.json"))
    parser.add_argument("--table", type=Path, metavar="FILE")
    parser.add_argument("--networks", default=",".join(NETWORKS), help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args(arguments)
    if options.table:
        print("\n".join(table(json.loads(options.table.read_text()))))
        return 0
    rows = []
    for name in options.networks.split(","):
        for mode in MODES:
            rows.append(measure(name, mode, options.seeds, options.steps))
            print(name, mode, f"distance {rows[-1]['distance']:.3f}, spread {rows[-1]['spread']:.3f}", flush=True)
            results = {"command": "python -m benchmarks.convergence", "environment": environment(), "rows": rows}
            write_json(options.out, results)
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
