"""What fusing keeps and takes, family by family: python -m benchmarks.families --out FILE

One training step of a model of each, float32 in channels_last, eager and fused in turn: bytes that autograd keeps, and
the time of forward and backward, as the median of paired ratios with its interval.
"""

import argparse
import copy
import sys
import warnings
from pathlib import Path

import torch

import resfuse
from resfuse.bench import coverage
from resfuse.bench.results import write_json
from resfuse.testing.environment import environment
from resfuse.testing.memory import saved_bytes
from resfuse.testing.timing import interleave, ratio

COMMAND = "python -m benchmarks.families"
MODELS = (
    ("torchvision", "resnet18"), ("torchvision", "resnet50"), ("timm", "resnet50d"), ("timm", "seresnet50"),
    ("timm", "regnetx_016"), ("timm", "regnety_016"), ("torchvision", "densenet121"), ("torchvision", "vgg11_bn"),
    ("torchvision", "mobilenet_v2"), ("timm", "mobilenetv3_large_100"), ("torchvision", "mnasnet1_0"),
    ("torchvision", "efficientnet_b0"), ("timm", "efficientnet_b0"), ("torchvision", "efficientnet_v2_s"),
    ("torchvision", "shufflenet_v2_x1_0"),
)  # fmt: skip
BATCH, PIXELS = 8, 160
HEAD = ("| model | convolution multiply-adds fused | kept | eager / fused, time |", "|---|---|---|---|")


def measure(library: str, name: str, rounds: int) -> dict:
    torch.manual_seed(0)
    model, _ = coverage.build(library, name, meta=False)
    eager = model.to(memory_format=torch.channels_last).train()
    fused = resfuse.fuse(copy.deepcopy(eager))
    x = torch.randn(BATCH, 3, PIXELS, PIXELS).contiguous(memory_format=torch.channels_last)
    calls = {"eager": lambda: eager(x).sum().backward(), "fused": lambda: fused(x).sum().backward()}
    seconds = interleave(calls, budget=1, minimum=rounds, warmup=2)
    median, low, high, *_ = ratio(seconds["eager"], seconds["fused"])
    kept = [saved_bytes(lambda m=m: m(x), m) for m in (eager, fused)]
    share = resfuse.report(fused, input_size=(1, 3, PIXELS, PIXELS)).coverage
    return {
        "model": f"{library} {name}", "coverage": round(share, 3), "kept": round(kept[1] / kept[0], 3),
        "time": round(median, 3), "low": round(low, 3), "high": round(high, 3),
    }  # fmt: skip


def table(results: dict) -> list[str]:
    rows = results["rows"]
    return [*HEAD, *(
        f"| {r['model']} | {r['coverage']:.0%} | {r['kept']:.2f}x | {r['time']:.2f}x ({r['low']:.2f}-{r['high']:.2f}) |"
        for r in rows
    )]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Memory and time of a fused model of each family.")
    parser.add_argument("--out", type=Path, default=Path("resfuse-families.json"))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [measure(library, name, options.rounds) for library, name in MODELS]
    results = {"command": COMMAND, "environment": environment(), "batch": BATCH, "pixels": PIXELS, "rows": rows}
    write_json(options.out, results)
    print("\n".join(table(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
