"""A training step's memory over time, and its time: eager, compiled, checkpointed, as lean as resfuse is told to be.

    python -m benchmarks.memory_step [--subjects resnet50:float32,...] [--out FILE] [--rounds N] [--plot PNG]   measures
    python -m benchmarks.memory_step --table FILE                               prints docs/memory.md's table

Saved bytes as in benchmarks/memory.py. Peaks and memory over time: everything that torch's allocator hands out on a CPU
between the start of forward and the end of backward; gradients of parameters are there before. Each way has a process
of its own, so that none works in memory that another has left in pieces. Times are of steps in interleaved rounds,
each round's ratio to the round's balanced step, their median with its interval; without rounds nothing is compiled.
"""

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import resfuse
from resfuse.bench.results import write_json
from resfuse.bench.workloads import make
from resfuse.testing.environment import environment
from resfuse.testing.memory import saved_bytes, timeline
from resfuse.testing.timing import interleave, ratio

BATCH = 8
SUBJECTS = "resnet50:float32,resnet50:autocast-bfloat16,resnet152:float32"
STAGES = ("layer1", "layer2", "layer3", "layer4")
POINTS = 300  # of memory over time that a results file has: the most in each share of a step's time


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def by_block(model: nn.Module) -> nn.Module:
    for stage in STAGES:
        setattr(model, stage, nn.Sequential(*map(Checkpointed, getattr(model, stage))))
    return model


def by_stage(model: nn.Module) -> nn.Module:
    for stage in STAGES:
        setattr(model, stage, Checkpointed(getattr(model, stage)))
    return model


def fused(model: nn.Module, memory: str | float) -> nn.Module:
    return resfuse.fuse(model, config=resfuse.FuseConfig(memory=memory))


EAGER, COMPILED = "eager", "torch.compile"
WAYS = {
    EAGER: lambda model: model, COMPILED: torch.compile,
    "checkpoint per block": by_block, "checkpoint per stage": by_stage,
    **{memory: partial(fused, memory=memory) for memory in ("balanced", "lean", "leanest")},
}  # fmt: skip


class Trained:
    """A model at work, its gradients there."""

    def __init__(self, workload, way: str):
        self.model, self.workload = WAYS[way](copy.deepcopy(workload.model)), workload
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)

    def forward(self) -> Tensor:
        autocast = self.workload.mode.autocast
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            out = self.model(self.workload.x)
        return F.cross_entropy(out.float(), self.workload.target)

    def step(self) -> None:
        self.forward().backward()


def measure(subject: str, mode: str, ways: Sequence[str], rounds: int) -> dict:
    with ExitStack() as stack:
        processes = {
            way: stack.enter_context(
                ProcessPoolExecutor(1, get_context("spawn"), initializer=_begin, initargs=(subject, mode, way))
            )
            for way in ways
            if rounds or way != COMPILED
        }
        rows = {}
        for way, process in processes.items():
            row = rows[way] = process.submit(_memory).result()
            print(subject, mode, way, row["saved_bytes"], "bytes saved,", row["peak_bytes"], "at the peak", flush=True)
        if rounds:
            calls = {way: lambda process=process: process.submit(_step).result() for way, process in processes.items()}
            seconds = interleave(calls, budget=1, minimum=rounds)
            for way, row in rows.items():
                row["seconds"] = seconds[way]
                print(subject, mode, way, ratio(seconds[way], seconds["balanced"]), flush=True)
    return {"subject": subject, "mode": mode, "batch": BATCH, "ways": rows}


def _begin(subject: str, mode: str, way: str) -> None:
    global trained
    trained = Trained(make(subject, mode, BATCH), way)
    trained.step()


def _memory() -> dict:
    saved = saved_bytes(trained.forward, trained.model)
    line = timeline(trained.step)
    return {"saved_bytes": saved, "peak_bytes": max(held for _, held in line), "timeline": thinned(line)}


def _step() -> None:
    trained.step()


def thinned(line: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """(share of the step's time, the most bytes held in that share)."""
    start, end = line[0][0], line[-1][0]
    most: dict[int, int] = {}
    for moment, held in line:
        place = min(int(POINTS * (moment - start) / (end - start)), POINTS - 1)
        most[place] = max(most.get(place, 0), held)
    return [(place / POINTS, held) for place, held in sorted(most.items())]


def table(results: dict) -> list[str]:
    lines = []
    for row in results["steps"]:
        ways = row["ways"]
        lines += [
            f"**{row['subject']}, {row['mode']}, batch {row['batch']}**", "",
            "| | saved | peak | time |", "|---|---|---|---|",
        ]  # fmt: skip
        for way, found in ways.items():
            cells = (
                f"{found[kind] / ways[EAGER][kind]:.3f}x ({found[kind] / 2**20:.0f} MiB)"
                for kind in ("saved_bytes", "peak_bytes")
            )
            lines.append(f"| {way} | {' | '.join(cells)} | {_time(found, ways['balanced'])} |")
        lines.append("")
    return lines


def _time(found: dict, balanced: dict) -> str:
    if "seconds" not in found:
        return ""
    times = ratio(found["seconds"], balanced["seconds"])
    return "1" if found is balanced else f"{times.median:.2f} ({times.low:.2f} to {times.high:.2f})"


def plot(results: dict, path: Path) -> None:
    from matplotlib.figure import Figure  # no global state, no display

    figure = Figure(figsize=(11, 3.6 * len(results["steps"])), layout="constrained")
    for axes, row in zip(figure.subplots(len(results["steps"]), squeeze=False)[:, 0], results["steps"], strict=True):
        for way, found in row["ways"].items():
            places, held = zip(*found["timeline"], strict=True)
            axes.step(places, [bytes_ / 2**20 for bytes_ in held], label=way, linewidth=1.2)
        axes.set_title(f"{row['subject']}, {row['mode']}, batch {row['batch']}, 224 px", fontsize=10)
        axes.set_ylabel("MiB held", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("share of the step's time", fontsize=9)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description="Memory over a step.")
    parser.add_argument("--subjects", default=SUBJECTS, help=f"network:mode, with commas between (default: {SUBJECTS})")
    parser.add_argument("--ways", default=";".join(WAYS), help=f"of {'; '.join(WAYS)}")
    parser.add_argument("--out", type=Path, default=Path("resfuse-memory-step.json"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--plot", type=Path, metavar="PNG")
    parser.add_argument("--table", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.table:
        print("\n".join(table(json.loads(options.table.read_text()))))
        return 0
    ways = options.ways.split(";")
    command = f"python -m benchmarks.memory_step --subjects {options.subjects} --rounds {options.rounds}"
    command += "" if ways == list(WAYS) else f' --ways "{options.ways}"'
    results = {"command": command, "environment": environment(), "steps": []}
    for subject, mode in (each.split(":") for each in options.subjects.split(",")):
        results["steps"].append(measure(subject, mode, ways, options.rounds))
        write_json(options.out, results)
    if options.plot:
        plot(results, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
