"""Training where memory is limited: which ways to train a network run at all, and which run out.

    python -m benchmarks.memory_limit [--subject resnet152] [--batch 24] [--limit 1024] [--out FILE]   measures
    python -m benchmarks.memory_limit --table FILE                              prints docs/memory.md's table

Every way has a process of its own on the CPU. It takes a small step, so that gradients, SGD's momentum and what
the libraries keep for good are there, then may allocate `--limit` MiB more (RLIMIT_DATA: the kernel refuses beyond),
vendor libraries' scratch memory included, and takes steps of the whole batch. Eager without a limit is beside them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import memory_step
from benchmarks.memory_step import COMPILED, EAGER, Trained
from resfuse.bench.results import write_json
from resfuse.bench.workloads import make
from resfuse.testing.environment import environment

MIB = 2**20
LEARNING_RATE = 0.01
MMAP_THRESHOLD = -3  # of mallopt(3)
UNLIMITED = "eager, no limit"
WAYS = (UNLIMITED, *(way for way in memory_step.WAYS if way != COMPILED))  # whose compiler needs memory too
SMALL = {"batch": 2, "size": 64}  # of the step before the limit
HEAD = ("| | loss of each step | time of a step | memory at most |", "|---|---|---|---|")


def status(field: str) -> int:
    """Bytes, by a field of this process's status: VmData is what RLIMIT_DATA counts, VmHWM the most of VmRSS."""
    return int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) * 1024


def train(subject: str, way: str, batch: int, size: int, steps: int, limit: int | None) -> dict:
    """Losses and seconds of the steps that were taken, and why there are no more."""
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_THRESHOLD, 64 * 1024)  # what is released is the system's again, and not spent from a heap
    workload = make(subject, "float32", batch, size=size)
    trained = Trained(workload, way)
    optimizer = torch.optim.SGD(trained.model.parameters(), lr=LEARNING_RATE, momentum=0.9)

    def step() -> float:
        loss = trained.forward()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return float(loss.detach())

    trained.workload = make(subject, "float32", **SMALL)
    optimizer.param_groups[0]["lr"] = 0.0
    step()
    optimizer.param_groups[0]["lr"] = LEARNING_RATE
    trained.workload = workload
    for state in optimizer.state.values():
        state["momentum_buffer"].zero_()
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins here
    resident = status("VmRSS")
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + limit,) * 2)
    found = {"losses": [], "seconds": [], "stopped": None}
    try:
        for _ in range(steps):
            start = time.perf_counter()
            found["losses"].append(step())
            found["seconds"].append(time.perf_counter() - start)
    except (RuntimeError, MemoryError) as error:
        if not re.search("memory|allocate|bad_alloc", f"{type(error).__name__} {error}"):
            raise
        found["stopped"] = "out of memory"
    found["resident_bytes"] = status("VmHWM") - resident
    return found


def table(results: dict) -> list[str]:
    lines = list(HEAD)
    for way, found in results["ways"].items():
        losses = found["stopped"] or ", ".join(f"{loss:.4f}" for loss in found["losses"])
        seconds = "" if found["stopped"] else f"{min(found['seconds']):.1f} s"
        held = "" if found["stopped"] else f"{found['resident_bytes'] / MIB:.0f} MiB"
        lines.append(f"| {way} | {losses} | {seconds} | {held} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description="Training under a limit on memory.")
    parser.add_argument("--subject", default="resnet152")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--limit", type=int, default=1024, help="MiB (default: 1024)")
    parser.add_argument("--ways", default=";".join(WAYS), help="names, with ; between")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("resfuse-memory-limit.json"))
    parser.add_argument("--table", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.table:
        print("\n".join(table(json.loads(options.table.read_text()))))
        return 0
    if options.one:
        free = options.one == UNLIMITED
        found = train(
            options.subject, EAGER if free else options.one, options.batch, options.size, options.steps,
            None if free else options.limit * MIB,
        )  # fmt: skip
        print(json.dumps(found))
        return 0
    settings = [
        f"--{name}={getattr(options, name)}" for name in ("subject", "batch", "size", "steps", "limit")
    ]  # fmt: skip
    results = {
        "command": " ".join(["python -m benchmarks.memory_limit", *settings]), "environment": environment(),
        "limit_bytes": options.limit * MIB, "ways": {},
    }  # fmt: skip
    for way in options.ways.split(";"):
        command = [sys.executable, "-m", "benchmarks.memory_limit", *settings, "--one", way]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results["ways"][way] = json.loads(output.splitlines()[-1])
        print(way, results["ways"][way], flush=True)
        write_json(options.out, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
