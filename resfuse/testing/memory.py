"""Memory of a training step: what autograd keeps between forward and backward, and the peak."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn


def saved_bytes(
    forward: Callable[[], Tensor | Iterable[Tensor]], model: nn.Module, exclude: Iterable[Tensor] = ()
) -> int:
    """Bytes of all storages that autograd saves while `forward()` runs, each storage counted once and whole.

    The tensors that `forward` returns count too: the block after this one keeps them as its input. Left out are the
    storages of the model's parameters and buffers and of `exclude` (a block's own input, counted with the block
    before). Tensors that a Function keeps on its context without `save_for_backward` escape the count; `peak_bytes`
    sees them.
    """
    ignored = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *exclude)}
    held: dict[int, torch.UntypedStorage] = {}  # held until the end: a freed address could come again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    for tensor in result if not isinstance(result, Tensor) else [result]:
        pack(tensor)
    return sum(storage.nbytes() for storage in held.values())


def peak_bytes(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Most bytes that torch's allocator held at once while `call()` ran, above those held when it began.

    CUDA: the caching allocator's own counter of bytes handed out. CPU: the running sum of every allocation and release
    that torch reports to its profiler; the vendor libraries' scratch memory is not reported to either.
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return max((held for _, held in timeline(call)), default=0)


def timeline(call: Callable[[], object]) -> list[tuple[float, int]]:
    """(microseconds, bytes held above those when it began) after each allocation and release on the CPU while `call()`
    ran, as torch reports them to its profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # or it reports the absence of a GPU as an error
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        call()
    held, found = 0, []
    for time, change in sorted(memory_events(profile)):
        held += change
        found.append((time, held))
    return found


def memory_events(profile: torch.profiler.profile) -> list[tuple[float, int]]:
    """(time, bytes allocated or, negative, released) of each CPU memory event, from the trace that torch exports."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return [
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0
    ]
