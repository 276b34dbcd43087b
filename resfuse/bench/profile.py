"""`python -m resfuse profile`: where the time and the memory of a step go, by torch.profiler: each operator or kernel,
each block and primitive, a trace, the memory along a step."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..ranges import profile_ranges
from ..testing.environment import environment
from ..testing.memory import memory_events
from .implementations import IMPLEMENTATIONS
from .results import SCHEMA, write_json
from .workloads import Runner, make

WARMUP = 2  # steps: buffers are taken, steps noted, on a GPU kernels compiled
SHOWN = 15  # rows of a table
STEP = "step"


def run(
    subject: str, mode: str, batch: int, names: Sequence[str], steps: int, device: torch.device, out: Path,
    console: Console,
) -> None:
    """Profile each implementation in turn; out: folder of profile.json and, of each, a trace and the memory of a step.

    subject, mode: as `workloads.make` takes them; names: of IMPLEMENTATIONS.
    """
    workload, found = make(subject, mode, batch, device), {}
    for name in names:
        runner = workload.runner(IMPLEMENTATIONS[name])
        for _ in range(WARMUP):
            runner.step()
        prefix = out / re.sub(r"\W+", "-", name)
        out.mkdir(parents=True, exist_ok=True)
        found[name] = measure(runner, steps, device, prefix.with_suffix(".trace.json"))
        _memory(runner, device, prefix)
    content = {
        "schema": SCHEMA, "kind": "profile", "command": shlex.join(["python", "-m", "resfuse", *sys.argv[1:]]),
        "environment": environment(device), "subject": subject, "mode": mode, "batch": batch, "steps": steps,
        "implementations": found,
    }  # fmt: skip
    write_json(out / "profile.json", content)
    show(content, console)
    console.print(f"Wrote {out}: profile.json; traces for https://ui.perfetto.dev; the memory of a step")


def capture(subject: str, mode: str, batch: int, name: str, steps: int, device: torch.device) -> None:
    """Steps between cudaProfilerStart and cudaProfilerStop, for nsys to record and nothing else. Blocks alone are
    ranges: steps are replayed as ever."""
    if device.type != "cuda":
        sys.exit("--capture is for nsys, on a GPU: make profile")
    runner = make(subject, mode, batch, device).runner(IMPLEMENTATIONS[name])
    with profile_ranges(primitives=False):
        for _ in range(WARMUP + 1):  # the second call of a kind is noted, the third the first that is replayed
            runner.step()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        for _ in range(steps):
            torch.cuda.nvtx.range_push(STEP)
            runner.step()
            torch.cuda.nvtx.range_pop()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def measure(runner: Runner, steps: int, device: torch.device, trace: Path) -> dict:
    """Rows of operators (kernels on a GPU) and of ranges, times in ms a step."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # or it reports the absence of a GPU as an error
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile_ranges(), profile(activities=activities, acc_events=True) as profiler:
        for _ in range(steps):
            with torch.profiler.record_function(STEP):
                runner.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(trace))
    return {"kernels": _kernels(profiler, steps, device), "ranges": _ranges(profiler, steps, device)}


def _kernels(profiler: profile, steps: int, device: torch.device) -> list[dict]:
    """Each operator's own time, or each kernel's, most first; those of one readable name together."""
    rows: dict[str, dict] = {}
    for event in profiler.key_averages():
        kernel = event.device_type == DeviceType.CUDA
        if event.is_user_annotation or kernel != (device.type == "cuda"):
            continue
        time = event.self_device_time_total if kernel else event.self_cpu_time_total
        row = rows.setdefault(readable(event.key), {"calls": 0, "ms": 0.0})
        row["calls"] += event.count
        row["ms"] += time / 1e3
    return _sorted(rows, steps)


def _ranges(profiler: profile, steps: int, device: torch.device) -> list[dict]:
    """Time from begin to end of each block, its steps and each primitive; on a GPU of the kernels in it."""
    rows = {}
    for event in profiler.key_averages():
        if event.is_user_annotation and event.device_type == DeviceType.CPU:
            time = event.device_time_total if device.type == "cuda" else event.cpu_time_total
            rows[event.key] = {"calls": event.count, "ms": time / 1e3}
    return _sorted(rows, steps)


def _sorted(rows: dict[str, dict], steps: int) -> list[dict]:
    found = [{"name": n, "calls": row["calls"] / steps, "ms": row["ms"] / steps} for n, row in rows.items()]
    return sorted(found, key=lambda row: -row["ms"])


def readable(name: str) -> str:
    """A kernel's name without its return type, template arguments, parameters and anonymous namespaces."""
    name = re.sub(r"\(anonymous namespace\)::", "", name.removeprefix("void "))
    if "<" not in name:
        return name.partition("(")[0] or name
    kept, depth = [], 0
    for character in name:
        if character == "(" and depth == 0:
            break
        depth += character == "<"
        if depth == 0:
            kept.append(character)
        depth -= character == ">"
    return "".join(kept)


def _memory(runner: Runner, device: torch.device, prefix: Path) -> None:
    """The bytes held along one step: on a GPU a snapshot for https://pytorch.org/memory_viz, else a figure."""
    if device.type == "cuda":
        torch.cuda.memory._record_memory_history()
        runner.step()
        torch.cuda.memory._dump_snapshot(str(prefix.with_suffix(".memory.pickle")))
        torch.cuda.memory._record_memory_history(enabled=None)
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        runner.step()
    plot_memory(memory_events(profiler), prefix.with_suffix(".memory.png"))


def plot_memory(events: Iterable[tuple[float, int]], path: Path) -> None:
    """events: (microseconds, bytes taken or, negative, given back), in any order."""
    from matplotlib.figure import Figure

    times, held = [], [0]
    for time, change in sorted(events):
        times.append(time)
        held.append(held[-1] + change)
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    axes.fill_between([(t - times[0]) / 1e3 for t in times], [h / 2**20 for h in held[1:]], step="post", alpha=0.6)
    axes.set(xlabel="ms", ylabel="MiB above what is held before the step")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def show(content: dict, console: Console) -> None:
    console.print(f"{content['environment']['device']}: {content['subject']}, {content['mode']}, batch "
                  f"{content['batch']}, {content['steps']} steps, under the profiler", highlight=False)
    for name, found in content["implementations"].items():
        for kind, title in (("kernels", "its own time"), ("ranges", "blocks and primitives, begin to end")):
            table = Table(title=f"{name}: {title}", title_justify="left")
            for index, column in enumerate(("name", "calls a step", "ms a step", "of the step")):
                table.add_column(column, justify="right" if index else "left")
            for row in rows_of(found, kind)[:SHOWN]:
                table.add_row(*row)
            console.print(table)


def rows_of(found: dict, kind: str) -> list[list[str]]:
    """Cells of one implementation's rows. kind: "kernels" or "ranges"; shares are of the kernels' sum."""
    whole = sum(row["ms"] for row in found["kernels"])
    return [[r["name"], f"{r['calls']:g}", f"{r['ms']:.2f}", f"{r['ms'] / whole:.1%}"] for r in found[kind]]


def table(content: dict, name: str, kind: str, count: int = SHOWN, only: str = "") -> list[str]:
    """Lines of Markdown, as docs/profiling.md has them, without times: a profiler's are no benchmark. only: what names
    begin with."""
    rows = [row for row in rows_of(content["implementations"][name], kind) if row[0].startswith(only)]
    lines = [f"| `{label}` | {calls} | {share} |" for label, calls, _, share in rows[:count]]
    return [f"| {name} | calls a step | of the step |", "|---|---|---|", *lines]
