"""The CPU kernel set: C++ kernels (`csrc/cpu`), float32 and bfloat16 storage, float32 arithmetic, channels_last.

Recipes are computed in cache by the kernels that read them. The vendor's convolutions serve what is not 1x1.
"""

import torch

from ... import _native
from ..interface import Reason

PRIMITIVES = (
    "apply", "avg_pool", "bn_act", "bn_act_backward", "bn_backward", "bn_dgrad", "bn_reduce",
    "bn_relu_max_pool", "bn_relu_max_pool_backward", "bn_stats", "conv_backward", "conv_stats", "covariance",
    "expand", "expand_coefficients", "expand_dgrad", "expand_products", "expand_stats", "finalize", "prepare",
    "select", "update_running",
)  # fmt: skip
ANY_ACTIVATION = True  # in the prologue of depthwise convolutions
STATUS = "C++ kernels, float32 and bfloat16; tested on the CPU they run on"


def unsupported(device: str, dtype: torch.dtype) -> list[Reason]:
    """Why this set cannot serve a device type and storage dtype; empty if it can. Loads no native code."""
    reasons = []
    if device != "cpu":
        reasons.append(Reason("device", f"the CPU kernels do not run on {device}"))
    if dtype not in (torch.float32, torch.bfloat16):
        reasons.append(Reason("dtype", f"the CPU kernels store float32 or bfloat16, not {dtype}"))
    return reasons + list(_native.unavailable())
