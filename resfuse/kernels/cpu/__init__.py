"""The CPU kernel set: C++ kernels, float32 and bfloat16 storage, float32 arithmetic."""

import torch

from ... import _native
from ..interface import Reason

PRIMITIVES = ("apply",)
STATUS = "first kernel: apply, float32 and bfloat16"


def unsupported(device: str, dtype: torch.dtype) -> list[Reason]:
    """Why this set cannot serve a device type and storage dtype; empty if it can. Loads no native code."""
    reasons = []
    if device != "cpu":
        reasons.append(Reason("device", f"the CPU kernels do not run on {device}"))
    if dtype not in (torch.float32, torch.bfloat16):
        reasons.append(Reason("dtype", f"the CPU kernels store float32 or bfloat16, not {dtype}"))
    return reasons + list(_native.unavailable())
