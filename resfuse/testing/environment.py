"""What a result was measured on and with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

from .._version import __version__

PACKAGES = ("torch", "torchvision", "triton", "numpy", "scikit-learn")


def environment(device: torch.device | str = "cpu") -> dict:
    """Device, processor, versions, commit and date, ready for JSON. Starts no device other than `device`."""
    return {
        "device": device_name(device),
        "device_type": torch.device(device).type,
        **({"gpu": _gpu(torch.device(device))} if torch.device(device).type == "cuda" else {}),
        "processor": processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "fast_bfloat16": fast_bfloat16(device),
        "threads": torch.get_num_threads(),
        "cores": len(_affinity()),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device | str = "cpu") -> str:
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def processor() -> str:
    """The CPU's model name where the system tells, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def fast_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether the device has bfloat16 instructions; oneDNN's bfloat16 convolutions are many times slower without."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def versions() -> dict[str, str | None]:
    """Version of each package, None where it is not installed; CUDA's and cuDNN's as torch was built with."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__
    found["resfuse"] = __version__
    found["cuda"] = torch.version.cuda
    found["cudnn"] = str(torch.backends.cudnn.version()) if torch.cuda.is_available() else None
    return found


def commit() -> str | None:
    """The commit of the checkout that this package lies in, "+dirty" where files differ from it; None outside one."""
    root = Path(__file__).parents[2]
    head = _git(root, "rev-parse", "--show-toplevel", "--short=12", "HEAD")
    if head is None or Path(head.splitlines()[0]) != root:
        return None
    dirty = _git(root, "status", "--porcelain", "--untracked-files=no")
    return head.splitlines()[1] + ("+dirty" if dirty else "")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _gpu(device: torch.device) -> dict:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
    }


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
