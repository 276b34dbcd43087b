"""What the kernel sets for NVIDIA GPUs can serve."""

from __future__ import annotations

import torch
from torch import Tensor

from .interface import Reason, Unsupported

STORED = (torch.float32, torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)


def unsupported(device: str, dtype: torch.dtype, kernels: str, instead: object) -> list[Reason]:
    """Why `kernels` ("the Triton kernels") cannot serve a device type and dtype; any device does where something runs
    them `instead` of a GPU."""
    reasons = []
    if dtype not in STORED:
        reasons.append(Reason("dtype", f"{kernels} store float32, bfloat16 or float16, not {dtype}"))
    if instead is not None:
        return reasons
    if torch.version.hip is not None:
        reasons.append(Reason("device", f"{kernels} are for NVIDIA GPUs, this torch is for AMD's"))
    if device != "cuda":
        reasons.append(Reason("device", f"{kernels} do not run on {device}"))
    elif torch.cuda.is_available() and torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability()))
        reasons.append(Reason("capability", f"{kernels} need compute capability 8.0, this GPU has {found}"))
    return reasons


def check_stored(instead: object, **tensors: Tensor | None) -> None:
    """Raise Unsupported unless each tensor is of a stored dtype, and on a GPU or served instead."""
    for name, t in tensors.items():
        if t is None:
            continue
        if t.dtype not in STORED:
            raise Unsupported([Reason("dtype", f"{name} is {t.dtype}")])
        if not t.is_cuda and instead is None:
            raise Unsupported([Reason("device", f"{name} is on {t.device}")])
