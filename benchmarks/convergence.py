"""Fused against eager training on scikit-learn's digits: python -m benchmarks.convergence [--out FILE] writes results,
python -m benchmarks.convergence --table FILE prints docs/benchmarking.md's table from them.

Two bottleneck ResNets, of 14 layers and of 110; every variant of a seed starts from the same weights and sees the same
batches (`resfuse/bench/verify.py`). "last bits" is eager from weights that differ by a rounding error: how far training
itself carries what is no more than that. Test accuracy is of float32 evaluation. Results do not depend on how fast the
machine is; runs that FILE has already are not made again.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import nn

import resfuse
from resfuse.bench.results import write_json
from resfuse.bench.verify import accuracy_of, curve_distance, digits, train
from resfuse.testing.environment import environment
from resfuse.testing.models import small_resnet

COMMAND = "python -m benchmarks.convergence"
NETWORKS = {
    "14 layers": partial(small_resnet, planes=(8, 16), blocks=2),
    "110 layers": partial(small_resnet, planes=(8, 16, 32), blocks=12),
}
EAGER, BITS, FUSED = "eager", "eager, last bits", "resfuse"
MODES = {"float32": None, "bfloat16": torch.bfloat16}
VARIANTS = [(EAGER, "float32"), (FUSED, "float32"), (FUSED, "bfloat16"), (BITS, "float32"), (EAGER, "bfloat16")]
SEEDS, STEPS, LAST = 3, 150, 10
HEAD = (
    "| network | | seeds | test accuracy, % | loss of the last steps | largest loss after step 50 | "
    "from eager in float32 |",
    "|---|---|---|---|---|---|---|",
)


def measure(network: str, variant: str, mode: str, seed: int, steps: int) -> dict:
    data, model = list(digits()), NETWORKS[network](seed=seed)
    if variant == BITS:
        _perturb(model, seed)
    if variant == FUSED:
        resfuse.fuse(model)
    curve = train(model, data, seed, steps, MODES[mode])
    return {
        "network": network, "variant": variant, "mode": mode, "seed": seed, "accuracy": accuracy_of(model, data),
        "curve": [float(f"{loss:.4g}") for loss in curve],
    }  # fmt: skip


def _perturb(model: nn.Module, seed: int) -> None:
    """Every weight by at most half a unit in its last place, up or down."""
    generator = torch.Generator().manual_seed(seed + 1)
    half = torch.finfo(torch.float32).eps / 2
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + half * (2 * torch.randint(0, 2, p.shape, generator=generator) - 1))


def table(results: dict) -> list[str]:
    """Means and standard deviations over seeds; the distance of a seed's loss curve from eager's in float32 as `verify`
    takes it, and on eager's own line that of different seeds."""
    lines, groups = list(HEAD), {}
    for run in results["runs"]:
        groups.setdefault((run["network"], run["variant"], run["mode"]), {})[run["seed"]] = run
    for (network, variant, mode), runs in groups.items():
        exact = groups[network, EAGER, "float32"]
        if (variant, mode) == (EAGER, "float32"):
            seeds = sorted(runs)
            pairs = [(runs[a], runs[b]) for a in seeds for b in seeds if a < b]
        else:
            pairs = [(run, exact[seed]) for seed, run in runs.items()]
        distances = [curve_distance(a["curve"], b["curve"]) for a, b in pairs]
        accuracy = [100 * run["accuracy"] for run in runs.values()]
        loss = [fmean(run["curve"][-LAST:]) for run in runs.values()]
        highest = max(max(run["curve"][50:], default=float("nan")) for run in runs.values())
        of = " (seed from seed)" if pairs[0][1]["seed"] != pairs[0][0]["seed"] else ""
        lines.append(
            f"| {network} | {variant}, {mode} | {len(runs)} | {_spread(accuracy, 1)} | {_spread(loss, 3)} | "
            f"{highest:.2f} | {_spread(distances, 3)}{of} |"
        )
    return lines


def _spread(values: list[float], decimals: int) -> str:
    return f"{fmean(values):.{decimals}f} ± {stdev(values) if len(values) > 1 else 0:.{decimals}f}"


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
    runs = json.loads(options.out.read_text())["runs"] if options.out.exists() else []
    wanted = [
        (network, *variant, seed) for network in options.networks.split(",") for variant in VARIANTS
        for seed in range(options.seeds)
    ]  # fmt: skip
    for key in wanted:
        if any((run["network"], run["variant"], run["mode"], run["seed"]) == key for run in runs):
            continue
        runs.append(measure(*key, options.steps))
        print(*key, f"accuracy {runs[-1]['accuracy']:.3f}, loss {runs[-1]['curve'][-1]:.3g}", flush=True)
        results = {"command": COMMAND, "environment": environment(), "steps": options.steps, "runs": runs}
        write_json(options.out, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
