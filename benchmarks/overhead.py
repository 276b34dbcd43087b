"""What the drop-in costs a host besides kernels: python -m benchmarks.overhead --out FILE

The time of `fuse` on ResNet-50, of the gate that each call of a fused block passes, and of reading the block's tensors
and settings after it. The best of many repetitions: what the code takes where nothing else runs.
"""

import argparse
import sys
import timeit
from pathlib import Path

import torch
from torchvision.models import resnet50

import resfuse
from resfuse.bench.results import write_json
from resfuse.blocks import resnet
from resfuse.testing.environment import environment

COMMAND = "python -m benchmarks.overhead"
HEAD = ("| block | gate, us | reading it, us |", "|---|---|---|")


def best(call, number: int, repeat: int = 40) -> float:
    return min(timeit.repeat(call, number=number, repeat=repeat)) / number


def measure() -> dict:
    torch.set_num_threads(1)
    model, x = resnet50(), torch.randn(1, 64, 8, 8)
    fuse_ms = 1e3 * best(lambda: resfuse.fuse(resfuse.unfuse(model)), 1)
    blocks = {"with a projection": model.layer1[0], "with an identity": model.layer1[1]}
    rows = []
    for name, block in blocks.items():
        assert block._refusal(x) is None
        gate = best(lambda block=block: block._refusal(x), 1000)
        reading = best(lambda block=block: resnet.convs(block), 1000)
        rows.append({"block": name, "gate_us": round(1e6 * gate, 2), "reading_us": round(1e6 * reading, 2)})
    return {"fuse_resnet50_ms": round(fuse_ms, 2), "rows": rows}


def table(results: dict) -> list[str]:
    return [*HEAD, *(f"| {r['block']} | {r['gate_us']:g} | {r['reading_us']:g} |" for r in results["rows"])]


def main() -> int:
    parser = argparse.ArgumentParser(description="Host time of fuse and of a fused block's gate.")
    parser.add_argument("--out", type=Path, default=Path("resfuse-overhead.json"))
    options = parser.parse_args()
    results = measure()
    write_json(options.out, {"command": COMMAND, "environment": environment(), **results})
    print("\n".join(table(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
