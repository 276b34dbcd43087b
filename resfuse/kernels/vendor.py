"""The vendor's convolutions (oneDNN, cuDNN) through ATen, in the layout of the activations.

A CPU without 16-bit dot products runs 16-bit convolutions several times slower than float32 ones; there the
operands are widened first. The products are the same numbers, rounded once more seldom.
"""

from functools import cache

import torch
from torch import Tensor

from .interface import Geometry


def dense(t: Tensor) -> Tensor:
    """t, or a copy of it, whose memory is channels_last or contiguous without gaps."""
    if t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last):
        return t
    return t.contiguous(memory_format=torch.channels_last if t.stride(1) == 1 else torch.contiguous_format)


def layout(t: Tensor) -> torch.memory_format:
    """The memory format of a dense tensor."""
    return torch.channels_last if t.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


@cache
def _cpu_multiplies(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return True


def _compute_dtype(t: Tensor) -> torch.dtype:
    return t.dtype if t.device.type != "cpu" or _cpu_multiplies(t.dtype) else torch.float32


def conv(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """x [N, C, H, W], weight [K, C/groups, R, S] -> [N, K, P, Q] in x's dtype and layout."""
    x = dense(x)
    compute, memory_format = _compute_dtype(x), layout(x)
    weight = weight.to(compute, memory_format=memory_format)
    z = torch.nn.functional.conv2d(x.to(compute), weight, None, *geometry)
    return z.to(x.dtype, memory_format=memory_format)


def conv_grads(
    dz: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """(dx in x's dtype, dweight) of `conv`; dweight is float32 where the operands were widened."""
    x = dense(x)
    compute, memory_format = _compute_dtype(x), layout(x)
    stride, padding, dilation, groups = geometry
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dz.to(compute), x.to(compute), weight.to(compute, memory_format=memory_format), None,
        stride, padding, dilation, False, [0, 0], groups, [*needs, False],
    )
    return dx.to(x.dtype, memory_format=memory_format) if needs[0] else None, dweight
