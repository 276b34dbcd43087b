"""The CUDA kernel set: compiled kernels (`csrc/cuda`) for NVIDIA GPUs of compute capability 8.0 and newer; bfloat16,
float16 and float32 storage, channels_last.

Recipes are computed in registers by the kernels that read them. What this set has no kernel for, others serve.
"""

import torch

from ... import _native
from ..interface import Reason
from . import _ops

PRIMITIVES = (
    "apply", "bn_backward", "bn_dgrad", "bn_reduce", "bn_relu_max_pool", "bn_relu_max_pool_backward", "bn_stats",
    "covariance", "expand_products", "finalize", "prepare", "select", "update_running",
)  # fmt: skip
STATUS = "CUDA C++ kernels; checked without a GPU (run on a CPU by an emulator, compiled), unproven on one"
LEAST_CAPABILITY = (8, 0)


def unsupported(device: str, dtype: torch.dtype) -> list[Reason]:
    """Why this set cannot serve a device type and storage dtype; empty if it can. Loads no native code."""
    reasons = []
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(Reason("dtype", f"the CUDA kernels store float32, bfloat16 or float16, not {dtype}"))
    if _ops.instead is not None:
        return reasons
    if device != "cuda":
        reasons.append(Reason("device", f"the CUDA kernels do not run on {device}"))
    elif torch.cuda.is_available() and torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability()))
        reasons.append(Reason("capability", f"the CUDA kernels need compute capability 8.0, this GPU has {found}"))
    reasons += _native.unavailable()
    if not _native.unavailable() and not _native.build_record().get("cuda_archs"):
        why = _native.build_record().get("cuda_left_out")
        reasons.append(Reason("cuda_left_out", f"the native library was built without CUDA kernels: {why}"))
    return reasons
