"""The CUDA kernel set: compiled kernels (`csrc/cuda`) for NVIDIA GPUs of compute capability 8.0 and newer; bfloat16,
float16 and float32 storage, channels_last.

Recipes are computed by the kernels that read them. Convolutions other than 1x1 and averages go through the vendor.
"""

import torch

from ... import _native
from .. import nvidia
from ..interface import Reason
from . import _ops

PRIMITIVES = (
    "apply", "avg_pool", "avg_pool_backward", "bn_act", "bn_act_backward", "bn_backward", "bn_dgrad", "bn_reduce",
    "bn_relu_max_pool", "bn_relu_max_pool_backward", "bn_stats", "conv_backward", "conv_stats", "covariance", "expand",
    "expand_coefficients", "expand_dgrad", "expand_products", "expand_stats", "finalize", "prepare", "scale_weight",
    "select", "update_running",
)  # fmt: skip
STATUS = (
    "CUDA C++ kernels; the older ones tested on compute capability 9.0, the newer and elsewhere checked without a GPU "
    "(emulated, compiled)"
)


def unsupported(device: str, dtype: torch.dtype) -> list[Reason]:
    """Why this set cannot serve a device type and storage dtype; empty if it can. Loads no native code."""
    reasons = nvidia.unsupported(device, dtype, "the CUDA kernels", _ops.instead)
    if _ops.instead is not None:
        return reasons
    reasons += _native.unavailable()
    if not _native.unavailable() and not _native.build_record().get("cuda_archs"):
        why = _native.build_record().get("cuda_left_out")
        reasons.append(Reason("cuda_left_out", f"the native library was built without CUDA kernels: {why}"))
    return reasons
