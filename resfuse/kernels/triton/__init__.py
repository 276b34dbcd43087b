"""The Triton kernel set: NVIDIA GPUs of compute capability 8.0 and newer; bfloat16, float16 and float32 storage.

Recipes are computed in registers by the kernels that read them. The vendor's convolutions serve what is not 1x1.
Importing this package loads no Triton; its primitives do.
"""

import importlib.util

import torch

from ..interface import PRIMITIVES as PRIMITIVES
from ..interface import Reason
from . import _launch

STATUS = "Triton kernels; checked without a GPU (interpreted, compiled), unproven on one"
LEAST_CAPABILITY = (8, 0)


def unsupported(device: str, dtype: torch.dtype) -> list[Reason]:
    """Why this set cannot serve a device type and storage dtype; empty if it can."""
    reasons = []
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(Reason("dtype", f"the Triton kernels store float32, bfloat16 or float16, not {dtype}"))
    if _launch.instead is not None:
        return reasons
    if importlib.util.find_spec("triton") is None:
        reasons.append(Reason("triton_missing", "Triton is not installed: pip install triton"))
    if device != "cuda":
        reasons.append(Reason("device", f"the Triton kernels do not run on {device}"))
    elif torch.cuda.is_available() and torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability()))
        reasons.append(Reason("capability", f"the Triton kernels need compute capability 8.0, this GPU has {found}"))
    return reasons
