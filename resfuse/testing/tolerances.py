"""The project's tolerance rule, written once: an error is judged against eager's own, both measured against float64.

Errors are normwise, `||a - ref|| / ||ref||`, and judged by their medians over seeds (10 in the tests).
Allowed are
    16-bit dtypes                1.2 x eager's median + 2 eps(dtype)
    float32 outputs, gradients   2 x eager's median + 2 eps(float32)
    float32 variances            4 eps(float32) kappa, channel by channel: eager's own error is near 0 there
    float64                      FLOAT64_FLOOR

Two kinds of result get more room: a median that exceeds its limit fails only if nine seeds in ten exceed it too.
They are
    blocks with kinks        One ReLU that flips near zero moves a gradient by far more than rounding does, in eager
                             too; medians of small blocks wander by more than the factors between two runs of eager.
                             Each such block has a twin without kinks (`cases.make_block`), held to its medians.
    results that are zero    The gradient of a shift that a training BatchNorm takes out again, say, is rounding alone,
    but for rounding         known by an error of eager's as large as the result itself. Both errors have the same
                             denominator, so absolute errors are compared; which rounding an implementation makes
                             there varies by more than the factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

FACTOR = {torch.bfloat16: 1.2, torch.float16: 1.2, torch.float32: 2.0}
FLOAT64_FLOOR = 1e-11  # long sums in another order, through a whole block
EPS32 = torch.finfo(torch.float32).eps


def relative_error(a: Tensor, ref: Tensor) -> float:
    """`||a - ref|| / ||ref||` in float64; NaN if either tensor holds one. Shapes must agree (ValueError).

    Infinities that agree count as no error. Where the reference is exactly zero, its norm is taken as the smallest
    normal float64, so that only a zero passes.
    """
    if a.shape != ref.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(ref.shape)}")
    a, ref = a.detach().double().cpu(), ref.detach().double().cpu()
    same = a == ref
    difference = torch.where(same, 0.0, a - ref)
    reference = torch.where(same & ref.isinf(), 0.0, ref)
    norm = max(reference.norm().item(), torch.finfo(torch.float64).tiny)
    return difference.norm().item() / norm


def allowed(eager_error: float, dtype: torch.dtype) -> float:
    """Largest median error that passes beside eager's median error, for the dtype the block computes in."""
    if dtype == torch.float64:
        return FLOAT64_FLOOR
    return FACTOR[dtype] * eager_error + 2 * torch.finfo(dtype).eps


def within_median(ours: Sequence[float], eager: Sequence[float], dtype: torch.dtype) -> bool:
    """Whether our median error is allowed beside eager's. A NaN or infinity among ours never passes."""
    return all(map(math.isfinite, ours)) and median(ours) <= allowed(median(eager), dtype)


def passes(ours: Sequence[float], eager: Sequence[float], dtype: torch.dtype, kinks: bool = True) -> bool:
    """The rule; kinks says whether rounding may flip a ReLU. A NaN or infinity among ours never passes."""
    if within_median(ours, eager, dtype):
        return True
    room = kinks or median(eager) >= 1
    exceeding = sum(not a <= allowed(b, dtype) for a, b in zip(ours, eager, strict=True))
    return room and all(map(math.isfinite, ours)) and exceeding < 0.9 * len(ours)


def check(
    name: str, ours: Sequence[float], eager: Sequence[float], dtype: torch.dtype, kinks: bool = True
) -> None:
    """Raise AssertionError with one sentence unless our errors pass; one error a seed in each list."""
    if not ours or len(ours) != len(eager):
        raise ValueError(f"{name}: {len(ours)} errors of ours against {len(eager)} of eager")
    if not passes(ours, eager, dtype, kinks):
        raise AssertionError(
            f"{name}: median error {median(ours):.3g} over {len(ours)} seeds (largest {max(ours):.3g}) exceeds "
            f"{allowed(median(eager), dtype):.3g}, allowed in {dtype} where eager's median is {median(eager):.3g}"
        )


def kappa(weight: Tensor, cov: Tensor, var: Tensor) -> Tensor:
    """Condition of a variance taken through a weight: `rowsum((|W| |cov|) * |W|) / var`, float64 [K].

    weight [K, C] or [K, C, 1, 1], cov [C, C] of its input, var [K] of its output.
    """
    weight = weight.detach().double().flatten(1).abs()
    return ((weight @ cov.detach().double().abs()) * weight).sum(1) / var.detach().double()


def check_variance(name: str, ours: Tensor, ref: Tensor, kappa: Tensor | float = 1.0) -> None:
    """Raise AssertionError unless each channel of a float32 variance is within 4 eps32 kappa of `ref`, relatively."""
    ours, ref = ours.detach().double(), ref.detach().double()
    error = (ours - ref).abs() / ref.abs()
    bound = 4 * EPS32 * torch.as_tensor(kappa, dtype=torch.float64).expand_as(error)
    bad = ~(error <= bound)  # NaN is bad
    if bad.any():
        worst = int((error / bound).nan_to_num(math.inf).argmax())
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} channels exceed 4 eps32 kappa; channel {worst} has relative "
            f"error {error[worst]:.3g}, allowed {bound[worst]:.3g}"
        )
