"""apply: a sum whose main branch is scale * z + shift, and its mask, one pass in C++ (`csrc/cpu/apply.cpp`)."""

import torch

from ... import _native
from ..interface import Norm, Padded, Reason, Second, Sum, Unsupported, Want, Written
from . import unsupported


def apply(a: Norm, total: Sum, want: Want) -> Written:
    residual = total.residual
    if isinstance(residual, Second):
        raise Unsupported([Reason("residual_second", "apply has no kernel for a second convolution as residual")])
    if isinstance(residual, Padded):
        raise Unsupported([Reason("residual_padded", "apply has no kernel for a residual of fewer channels")])
    if total.scale != 1 or total.row_scale is not None or total.gate is not None:
        raise Unsupported([Reason("weighed_sum", "apply has no kernel for a scaled or gated sum")])
    second = residual if isinstance(residual, Norm) else Norm(residual, None, None, relu=False)
    reasons = unsupported(a.z.device.type, a.z.dtype) + _layout("z", a.z)
    if second.z is not None:
        reasons += _layout("residual", second.z)
        if second.z.dtype != a.z.dtype:
            reasons.append(Reason("dtype", f"residual is {second.z.dtype} and z is {a.z.dtype}"))
    if reasons:
        raise Unsupported(reasons)
    out, mask = _native.load().apply(a.z, a.scale, a.shift, *second, total.relu, want.mask)
    return Written(out, mask if want.mask else None)


def _layout(name: str, t: torch.Tensor) -> list[Reason]:
    if t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last):
        return []
    return [Reason("layout", f"{name} is not dense in channels_last")]
