"""A network's train step on a GPU, eager, fused and in other ways in turn: what a step takes when many follow one
another, what the host and the device take of it, a step captured as a CUDA graph, peak memory.

    python -m benchmarks.train_step --out FILE --ways eager,torch.compile,resfuse
    python -m benchmarks.train_step --table FILE        the table of docs/gpu.md from such a file
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
import torchvision
from torch import nn
from torch.profiler import ProfilerActivity, profile

import resfuse
from resfuse.bench.results import write_json
from resfuse.testing.environment import environment


def _fused(**settings) -> Callable[[nn.Module], nn.Module]:
    return lambda model: resfuse.fuse(model, config=resfuse.FuseConfig(**settings))


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "eager": lambda model: model, "torch.compile": torch.compile, "resfuse": resfuse.fuse,
    "lean": _fused(memory="lean"), "leanest": _fused(memory="leanest"),
    "triton": _fused(backend="triton"), "cuda": _fused(backend="cuda"),
}  # fmt: skip


class Step:
    """SGD with momentum on one batch, under bf16 autocast."""

    def __init__(self, model: nn.Module, x: torch.Tensor, target: torch.Tensor):
        self.model, self.x, self.target = model, x, target
        self.optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def __call__(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        with torch.autocast(self.x.device.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(self.model(self.x), self.target)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def measure(
    name: str, batch: int, side: int, device: torch.device, ways: Sequence[str], rounds: int = 10, row: int = 10
) -> dict[str, dict]:
    """Of each way: step_ms, medians of `rounds` rows of steps, interleaved, with the least and the most; host_ms, the
    host's part of single steps, which find nothing queued; device_ms, the sum of a step's kernels, and how many;
    graph_ms; peak_gib above what is held before it; warm_s of the first steps, a compiler's time among them; the loss
    after them."""
    torch.backends.cudnn.benchmark = True
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(batch, 3, side, side, generator=generator, device=device)
    x = x.to(memory_format=torch.channels_last)
    target = torch.randint(0, 1000, (batch,), generator=generator, device=device)
    torch.manual_seed(0)
    start = torchvision.models.get_model(name).state_dict()
    steps, found = {}, {}
    for way in ways:
        model = torchvision.models.get_model(name)
        model.load_state_dict(start)
        steps[way] = Step(WAYS[way](model.to(device, memory_format=torch.channels_last)), x, target)
        found[way] = _warm(steps[way], device)
    for way, (all_, _) in timed(steps, rounds, row, device).items():
        found[way] |= {"step_ms": _spread(all_)}
    for way, (_, host) in timed(steps, rounds, 1, device).items():
        found[way] |= {"host_ms": _spread(host)}
    if device.type == "cuda":
        for way, step in steps.items():
            found[way] |= device_time(step)
        graphs = {way: captured(step) for way, step in steps.items()}
        for way, (all_, _) in timed(graphs, rounds, row, device).items():
            found[way]["graph_ms"] = _spread(all_)
    return found


def timed(
    calls: dict[str, Callable[[], object]], rounds: int, row: int, device: torch.device
) -> dict[str, tuple[list[float], list[float]]]:
    """Milliseconds of a call and of the host's part of it: `row` calls one after the other, waited for at the end."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in calls}
    names = list(calls)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            _wait(device)
            began = time.perf_counter()
            for _ in range(row):
                calls[name]()
            issued = time.perf_counter()
            _wait(device)
            for kept, end in zip(times[name], (time.perf_counter(), issued), strict=True):
                kept.append(1e3 * (end - began) / row)
    return times


def device_time(step: Step) -> dict[str, float]:
    """Milliseconds of all kernels of a step, and their number."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    kernels = [e.device_time for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return {"device_ms": sum(kernels) / 1e3, "kernels": len(kernels)}


def captured(step: Step) -> Callable[[], None]:
    """The step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    step.optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _warm(step: Step, device: torch.device) -> dict:
    """Compiled, noted, and its memory seen."""
    began = time.perf_counter()
    for _ in range(3):
        step()
    _wait(device)
    warm = time.perf_counter() - began
    if device.type != "cuda":
        return {"warm_s": warm, "loss": step().item()}
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    loss = step().item()
    return {"warm_s": warm, "loss": loss, "peak_gib": (torch.cuda.max_memory_allocated() - held) / 2**30}


def _spread(times: list[float]) -> dict[str, float]:
    return {"median": median(times), "low": min(times), "high": max(times)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def table(results: dict) -> list[str]:
    """Lines of Markdown from what `measure` gave, each way beside eager."""
    found = results.get("resnet50", results)
    eager = found["eager"]
    lines = ["| | step, ms | | kernels, ms | | as a graph, ms | | kernels | peak, GiB | | loss |", "|---" * 11 + "|"]
    for way, row in found.items():
        if not isinstance(row, dict) or "step_ms" not in row:
            continue
        cells = []
        for name in ("step_ms", "device_ms", "graph_ms"):
            if name not in row:  # on a CPU
                cells += ["-", "-"]
                continue
            ours, theirs = (r[name]["median"] if isinstance(r[name], dict) else r[name] for r in (row, eager))
            spread = f" ({row[name]['low']:.4g}-{row[name]['high']:.4g})" if isinstance(row[name], dict) else ""
            cells += [f"{ours:.4g}{spread}", f"{theirs / ours:.2f}x"]
        peak = row.get("peak_gib")
        share = ("-", "-") if peak is None else (f"{peak:.4g}", f"{peak / eager['peak_gib']:.2f}x")
        cells += [row.get("kernels", "-"), *share]
        lines.append("| " + " | ".join(map(str, [way, *cells, f"{row['loss']:.4g}"])) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="FILE")
    what.add_argument("--table", type=Path, metavar="FILE", help="print an earlier run's table")
    parser.add_argument("--model", default="resnet50", help="torchvision's name")
    parser.add_argument("--ways", default="eager,resfuse", help=f"of {', '.join(WAYS)}; default eager,resfuse")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--side", type=int, default=224, help="pixels")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--row", type=int, default=10, help="steps in a row, waited for at its end")
    options = parser.parse_args()
    if options.table:
        print("\n".join(table(json.loads(options.table.read_text()))))
        return
    ways = options.ways.split(",")
    if unknown := set(ways).difference(WAYS):
        parser.error(f"--ways: {', '.join(sorted(unknown))}, which is not of {', '.join(WAYS)}")
    found = measure(options.model, options.batch, options.side, options.device, ways, options.rounds, options.row)
    facts = {"model": options.model, "batch": options.batch, "side": options.side}
    write_json(options.out, {"environment": environment(options.device), **facts, **found})
    for name, row in found.items():
        print(name, {k: round(v["median"] if isinstance(v, dict) else v, 2) for k, v in row.items()})


if __name__ == "__main__":
    main()
