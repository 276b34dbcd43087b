"""Recipes as the operators take them, and the refusals of what they cannot read."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import flat
from ..interface import (
    Act,
    BNGrad,
    Grad,
    Masked,
    Norm,
    Reason,
    Second,
    Sum,
    Unsupported,
    Want,
)
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


def check_stored(**matrices: Tensor) -> None:
    """Raise Unsupported unless each matrix is on the CPU, contiguous and of a stored dtype."""
    reasons = []
    for name, t in matrices.items():
        if t.dtype not in STORED or t.device.type != "cpu" or not t.is_contiguous():
            reasons += unsupported(t.device.type, t.dtype) or [Reason("layout", f"{name} is not contiguous")]
    if reasons:
        raise Unsupported(reasons)


def act(a: Act) -> tuple:
    """`flat.act`, checked."""
    found = flat.act(a)
    check_views(a=found[0])
    return found


def any_act(a: Act) -> tuple:
    """(x, x_scale, x_shift, act, act_slope), checked: as `act`, with any activation."""
    if isinstance(a, Norm) and a.act is not None:
        check_views(a=a.z)
        return a.z, a.scale, a.shift, *flat.activation(a.act)
    return *act(a), 0.0


def masked(g: Tensor | Masked) -> tuple:
    """`flat.masked`, checked."""
    found = flat.masked(g)
    check_rows(g=found[0])
    return found


def gradient(g: Grad) -> tuple:
    """`flat.gradient`, checked."""
    found = flat.gradient(g)
    check_rows(g=found[0])
    if isinstance(g, BNGrad):
        check_rows(z=g.z)
    return found


def total(s: Sum, want: Want) -> tuple:
    """`flat.total`, checked."""
    found = flat.total(s, want)
    check_views(residual=found[0])
    check_rows(gate=s.gate)
    return found


def second(residual) -> tuple:
    """(second, second_scale, second_shift, second_relu, second_weight) of an `expand`."""
    return (*act(residual.x), residual.weight) if isinstance(residual, Second) else (None, None, None, False, None)


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
