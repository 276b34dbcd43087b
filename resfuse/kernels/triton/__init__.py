"""The Triton kernel set: NVIDIA GPUs of compute capability 8.0 and newer; bfloat16, float16 and float32 storage.

Recipes are computed in registers by the kernels that read them. The vendor's convolutions serve what is not 1x1.
Importing this package loads no Triton; its primitives do.
"""

import importlib.metadata

import torch

from ..interface import PRIMITIVES as PRIMITIVES
from ..interface import Reason
from . import _launch

STATUS = "Triton kernels; checked without a GPU (interpreted, compiled), unproven on one"
LEAST_CAPABILITY = (8, 0)
LEAST_TRITON = (3, 6)  # whose tuples carry the operands


def unsupported(device: str, dtype: torch.dtype) -> list[Reason]:
    """Why this set cannot serve a device type and storage dtype; empty if it can."""
    reasons = []
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(Reason("dtype", f"the Triton kernels store float32, bfloat16 or float16, not {dtype}"))
    if _launch.instead is not None:
        return reasons
    reasons += unavailable()
    if torch.version.hip is not None:
        reasons.append(Reason("device", "the Triton kernels are for NVIDIA GPUs, this torch is for AMD's"))
    if device != "cuda":
        reasons.append(Reason("device", f"the Triton kernels do not run on {device}"))
    elif torch.cuda.is_available() and torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability()))
        reasons.append(Reason("capability", f"the Triton kernels need compute capability 8.0, this GPU has {found}"))
    return reasons


def unavailable() -> list[Reason]:
    """Why the installed Triton cannot compile the kernels; empty if it can. Loads no Triton."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return [Reason("triton_missing", "Triton is not installed: pip install triton")]
    if tuple(map(int, version.split(".")[:2])) < LEAST_TRITON:
        least = ".".join(map(str, LEAST_TRITON))
        return [Reason("triton_version", f"the Triton kernels need Triton {least} or newer, this is {version}")]
    return []
