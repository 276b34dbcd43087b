"""Floating-point operations of the native operators' products, for torch.utils.flop_counter: two for each multiply-add,
as there; what is no product counts as none.

A formula is given what the operator is, shapes for tensors.
"""

from __future__ import annotations

from functools import cache
from math import prod

import torch


@cache
def register(namespace: str) -> None:
    """Gives the operators of a loaded library, torch.ops.<namespace>, their formulas."""
    from torch.utils.flop_counter import register_flop_formula  # which imports Triton: only where it is wanted

    for name, formula in FORMULAS.items():
        register_flop_formula(getattr(getattr(torch.ops, namespace), name))(formula)


def _pixels(shape) -> int:
    return shape[0] * prod(shape[2:])


def _conv_stats(x, x_scale, x_shift, x_relu, weight, *rest, **_) -> int:
    return 2 * _pixels(x) * prod(weight)


def _conv_window(x, x_scale, x_shift, x_relu, weight, stride, padding, dilation, height, width, *rest, **_) -> int:
    return 2 * x[0] * height * width * prod(weight)


def _conv_window_dgrad(dout, *rest, **_) -> int:
    return 2 * _pixels(dout) * prod(rest[9])


def _conv_window_wgrad(dout, *rest, **_) -> int:
    x, size = rest[9], rest[13]
    return 2 * _pixels(dout) * dout[1] * x[1] * prod(size)


def _covariance(x, *rest, **_) -> int:
    return 2 * _pixels(x) * x[1] ** 2


def _expand(x, x_scale, x_shift, x_relu, weight, scale, shift, second, *rest, **_) -> int:
    inner = 0 if second is None else second[1]
    return 2 * _pixels(x) * weight[0] * (weight[1] + inner)


def _expand_products(dout, mask, row_scale, factor, x, x_scale, x_shift, x_relu, mean, wg, *rest, **_) -> int:
    return (2 if wg is None else 4) * _pixels(dout) * dout[1] * x[1]


def _expand_dgrad(dout, mask, row_scale, factor, u, x, x_scale, x_shift, x_relu, wg, q, *rest, **_) -> int:
    depth = (dout[1] if u is None else 0) + (0 if q is None else x[1])
    return 2 * _pixels(x) * x[1] * depth


def _expand_stats(weight, *rest, **_) -> int:
    return 2 * weight[0] * weight[1] ** 2


def _expand_coefficients(products, sum_g, weight, *rest, **_) -> int:
    return 4 * weight[0] * weight[1] ** 2


def _conv_backward(dout, *rest, **_) -> int:
    x, wanted = rest[9], rest[-2:]
    return 2 * sum(wanted) * _pixels(dout) * dout[1] * x[1]


FORMULAS = {
    formula.__name__.removeprefix("_"): formula
    for formula in (
        _conv_backward, _conv_stats, _conv_window, _conv_window_dgrad, _conv_window_wgrad, _covariance, _expand,
        _expand_coefficients, _expand_dgrad, _expand_products, _expand_stats,
    )
}  # fmt: skip
