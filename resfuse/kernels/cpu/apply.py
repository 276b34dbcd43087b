"""apply: out = act(scale * z + shift + residual) and its mask, one pass in C++ (`csrc/cpu/apply.cpp`)."""

import torch
from torch import Tensor

from ... import _native
from ..interface import Norm, Reason, Residual, Second, Unsupported
from . import unsupported


def apply(a: Norm, residual: Residual, relu: bool, want_mask: bool) -> tuple[Tensor, Tensor | None]:
    if isinstance(residual, Second):
        raise Unsupported([Reason("residual_second", "apply has no kernel for a second convolution as residual")])
    second = residual if isinstance(residual, Norm) else Norm(residual, None, None, relu=False)
    reasons = unsupported(a.z.device.type, a.z.dtype) + _layout("z", a.z)
    if second.z is not None:
        reasons += _layout("residual", second.z)
        if second.z.dtype != a.z.dtype:
            reasons.append(Reason("dtype", f"residual is {second.z.dtype} and z is {a.z.dtype}"))
    if reasons:
        raise Unsupported(reasons)
    out, mask = _native.load().apply(a.z, a.scale, a.shift, *second, relu, want_mask)
    return out, mask if want_mask else None


def _layout(name: str, t: Tensor) -> list[Reason]:
    if t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last):
        return []
    return [Reason("layout", f"{name} is not dense in channels_last")]
