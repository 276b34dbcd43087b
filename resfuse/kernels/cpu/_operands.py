"""Recipes as the operators take them, and the refusals of what they cannot read."""

from __future__ import annotations

import torch
from torch import Tensor

from ..interface import Act, BNGrad, Grad, Masked, Norm, Padded, Reason, Second, Sum, Unsupported, Want, Written
from . import unsupported

STORED = (torch.float32, torch.bfloat16)


def check_rows(**tensors: Tensor | None) -> None:
    """Raise Unsupported unless each tensor is on the CPU, of a stored dtype and dense channels_last."""
    for t in tensors.values():
        if t is not None and not (_is_stored(t) and _is_dense(t)):
            raise Unsupported(_reasons(tensors, _is_dense, "is not dense in channels_last"))


def check_views(**tensors: Tensor | None) -> None:
    """As `check_rows`, strided views of channels_last too."""
    for t in tensors.values():
        if t is not None and not (_is_stored(t) and _is_view(t)):
            raise Unsupported(_reasons(tensors, _is_view, "is not channels_last, nor a strided view of it"))


def check_vectors(dtype: torch.dtype = torch.float32, **vectors: Tensor | None) -> None:
    """Raise Unsupported unless each vector is on the CPU, contiguous and of the dtype."""
    reasons = []
    for name, t in vectors.items():
        if t is not None and not (t.dtype == dtype and t.is_cpu and t.is_contiguous()):
            reasons.append(Reason("vector", f"{name} is {t.dtype} on {t.device}, not contiguous {dtype} on the CPU"))
    if reasons:
        raise Unsupported(reasons)


def vector(t: Tensor | None) -> Tensor | None:
    """A parameter as the operators take it."""
    return t if t is None or t.dtype == torch.float32 else t.float()


def check_stored(**matrices: Tensor) -> None:
    """Raise Unsupported unless each matrix is on the CPU, contiguous and of a stored dtype."""
    reasons = []
    for name, t in matrices.items():
        if t.dtype not in STORED or t.device.type != "cpu" or not t.is_contiguous():
            reasons += unsupported(t.device.type, t.dtype) or [Reason("layout", f"{name} is not contiguous")]
    if reasons:
        raise Unsupported(reasons)


def act(a: Act) -> tuple:
    """(x, x_scale, x_shift, x_relu)."""
    x, scale, shift, relu = a if isinstance(a, Norm) else (a, None, None, False)
    check_views(a=x)
    return x, scale, shift, relu


def masked(g: Tensor | Masked) -> tuple:
    """(dout, mask, row_scale, factor)."""
    dout, mask, row_scale, factor = g if isinstance(g, Masked) else (g, None, None, 1.0)
    check_rows(g=dout)
    return dout, mask, row_scale, factor


def gradient(g: Grad) -> tuple:
    """`masked`, and behind it (z, scale, shift, mean, mean_dy, slope), None where there is no BatchNorm."""
    if not isinstance(g, BNGrad):
        return *masked(g), None, None, None, None, None, None
    check_rows(z=g.z)
    return *masked(g.dy), g.z, g.scale, g.shift, g.mean, g.mean_dy, g.slope


def total(s: Sum, want: Want) -> tuple:
    """The operands of a sum; a `Second` leaves its scale and shift alone in it."""
    residual, scale, shift, relu, before = s.residual, None, None, False, 0
    if isinstance(residual, Padded):
        residual, before, _ = residual
    if isinstance(residual, Norm):
        residual, scale, shift, relu = residual
    elif isinstance(residual, Second):
        residual, scale, shift = None, residual.scale, residual.shift
    check_views(residual=residual)
    check_rows(gate=s.gate)
    return (
        residual, scale, shift, relu, before, s.row_scale, s.gate, s.scale, s.relu, want.mask, want.stats,
    )  # fmt: skip


def second(residual) -> tuple:
    """(second, second_scale, second_shift, second_relu, second_weight) of an `expand`."""
    return (*act(residual.x), residual.weight) if isinstance(residual, Second) else (None, None, None, False, None)


def written(results: tuple[Tensor, Tensor, Tensor, Tensor], want: Want, stats: type) -> Written:
    out, mask, mean, var = results
    return Written(out, mask if want.mask else None, stats(mean, var) if want.stats else None)


def _is_stored(t: Tensor) -> bool:
    return t.is_cpu and t.dtype in STORED and t.dim() == 4


def _is_dense(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last)


def _is_view(t: Tensor) -> bool:
    return t.stride(1) == 1 or _is_dense(t)


def _reasons(tensors: dict[str, Tensor | None], readable, otherwise: str) -> list[Reason]:
    reasons = []
    for name, t in tensors.items():
        if t is not None and not (_is_stored(t) and readable(t)):
            reasons += unsupported(t.device.type, t.dtype) or [Reason("layout", f"{name} {otherwise}")]
    return reasons
