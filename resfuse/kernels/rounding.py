"""Which shorter formats torch's switches let products of float32 round their operands to."""

from __future__ import annotations

import torch
from torch import Tensor


def rounds_to_tf32(t: Tensor) -> bool:
    """Whether products of t read it rounded to tf32: float32, as torch's switch has it for convolutions."""
    if t.dtype != torch.float32:
        return False
    conv = getattr(torch.backends.cudnn, "conv", None)
    if conv is None or not hasattr(conv, "fp32_precision"):  # torch before 2.9
        return torch.backends.cudnn.allow_tf32
    return conv.fp32_precision == "tf32"


def round_to_tf32(t: Tensor) -> Tensor:
    """float32 rounded to tf32's 10 mantissa bits, to nearest, ties away from zero."""
    return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def reduced_products(device: torch.device) -> str | None:
    """The shorter format, "tf32" or "bf16", to which torch's switches let float32 products round; None for none."""
    backend = torch.backends.cuda.matmul if device.type == "cuda" else getattr(torch.backends.mkldnn, "matmul", None)
    precision = getattr(backend, "fp32_precision", None)
    if precision is None:  # torch before 2.9
        precision = "tf32" if device.type == "cuda" and backend.allow_tf32 else None
    return precision if precision in ("tf32", "bf16") else None
