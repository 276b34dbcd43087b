"""A network's train step on a GPU, eager and fused in turn: what a step takes when many follow one another, what the
host and the device take of it, a step captured as a CUDA graph, peak memory.

    python -m benchmarks.train_step --out FILE
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torchvision
from torch import nn
from torch.profiler import ProfilerActivity, profile

import resfuse
from resfuse.bench.results import write_json
from resfuse.testing.environment import environment


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


def measure(name: str, batch: int, side: int, device: torch.device, rounds: int = 10, row: int = 3) -> dict[str, dict]:
    """For eager and resfuse: step_ms and host_ms, medians of `rounds` rows of steps, interleaved, with the least and
    the most; device_ms, the sum of a step's kernels; graph_ms; peak_gib above what is held before it; the loss."""
    torch.backends.cudnn.benchmark = True
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(batch, 3, side, side, generator=generator, device=device)
    x = x.to(memory_format=torch.channels_last)
    target = torch.randint(0, 1000, (batch,), generator=generator, device=device)
    torch.manual_seed(0)
    eager = torchvision.models.get_model(name).to(device, memory_format=torch.channels_last)
    fused = torchvision.models.get_model(name).to(device, memory_format=torch.channels_last)
    fused.load_state_dict(eager.state_dict())
    steps = {"eager": Step(eager, x, target), "resfuse": Step(resfuse.fuse(fused), x, target)}
    found: dict[str, dict] = {each: _warm(step, device) for each, step in steps.items()}
    for each, (all_, host) in timed(steps, rounds, row, device).items():
        found[each] |= {"step_ms": _spread(all_), "host_ms": _spread(host)}
    if device.type == "cuda":
        for each, step in steps.items():
            found[each]["device_ms"] = device_time(step)
        graphs = {each: captured(step) for each, step in steps.items()}
        for each, (all_, _) in timed(graphs, rounds, row, device).items():
            found[each]["graph_ms"] = _spread(all_)
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


def device_time(step: Step) -> float:
    """Milliseconds of all kernels of a step."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    return sum(e.device_time for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA) / 1e3


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
    for _ in range(3):
        step()
    _wait(device)
    if device.type != "cuda":
        return {"loss": step().item()}
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    loss = step().item()
    return {"loss": loss, "peak_gib": (torch.cuda.max_memory_allocated() - held) / 2**30}


def _spread(times: list[float]) -> dict[str, float]:
    return {"median": median(times), "low": min(times), "high": max(times)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--model", default="resnet50", help="torchvision's name")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--side", type=int, default=224, help="pixels")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    options = parser.parse_args()
    found = measure(options.model, options.batch, options.side, options.device)
    facts = {"model": options.model, "batch": options.batch, "side": options.side}
    write_json(options.out, {"environment": environment(options.device), **facts, **found})
    for name, row in found.items():
        print(name, {k: round(v["median"] if isinstance(v, dict) else v, 2) for k, v in row.items()})


if __name__ == "__main__":
    main()
