"""Recipes as the native operators take them (`csrc/schemas.h`): flat tuples, None for what there is none of."""

from __future__ import annotations

import torch
from torch import Tensor

from .interface import (
    ACTIVATIONS,
    Act,
    Activation,
    BNGrad,
    Grad,
    Masked,
    Norm,
    Padded,
    Reason,
    Second,
    Stats,
    Sum,
    Unsupported,
    Want,
    Written,
)


def act(a: Act) -> tuple:
    """(x, x_scale, x_shift, x_relu)."""
    if not isinstance(a, Norm):
        return a, None, None, False
    if a.act is not None:
        raise Unsupported([Reason("activation", f"no kernel but bn_act has {a.act.kind} in its prologue")])
    return a[:4] if a.y is None else (a.y, None, None, False)


def activation(act: Activation) -> tuple[int, float]:
    """An activation other than ReLU by its number in `csrc/common/activations.h`, and its slope."""
    return 2 + ACTIVATIONS.index(act.kind), act.slope


def masked(g: Tensor | Masked) -> tuple:
    """(dout, mask, row_scale, factor)."""
    return tuple(g) if isinstance(g, Masked) else (g, None, None, 1.0)


def gradient(g: Grad) -> tuple:
    """`masked`, and behind it (z, scale, shift, mean, mean_dy, slope)."""
    if not isinstance(g, BNGrad):
        return *masked(g), None, None, None, None, None, None
    return *masked(g.dy), g.z, g.scale, g.shift, g.mean, g.mean_dy, g.slope


def total(s: Sum, want: Want) -> tuple:
    """The operands of a sum; a `Second` leaves its scale and shift alone in it."""
    residual, scale, shift, relu, before = s.residual, None, None, False, 0
    if isinstance(residual, Padded):
        residual, before, _ = residual
    if isinstance(residual, Norm):
        residual, scale, shift, relu, *_ = residual
    elif isinstance(residual, Second):
        residual, scale, shift = None, residual.scale, residual.shift
    return (
        residual, scale, shift, relu, before, s.row_scale, s.gate, s.scale, s.relu, want.mask, want.stats,
    )  # fmt: skip


def written(results: tuple[Tensor, Tensor, Tensor, Tensor], want: Want) -> Written:
    out, mask, mean, var = results
    return Written(out, mask if want.mask else None, Stats(mean, var) if want.stats else None)


def vector(t: Tensor | None) -> Tensor | None:
    """A parameter as the operators take it."""
    return t if t is None or t.dtype == torch.float32 else t.float()
