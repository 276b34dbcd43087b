"""What the native operators (`csrc/schemas.h`) return, without computing it: shapes, dtypes and layouts, for tracers.

A fake is given what the operator is; sizes may be symbols. What was not asked for is a tensor of no elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


@cache
def register(namespace: str) -> None:
    """Gives the operators of a loaded library, torch.ops.<namespace>, their fakes: once, as torch wants it."""
    for name, fake in FAKES.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)


def _image(like: Tensor, channels, height, width, dtype: torch.dtype | None = None) -> Tensor:
    size, dtype = (like.shape[0], channels, height, width), dtype or like.dtype
    return torch.empty(size, dtype=dtype, device=like.device, memory_format=torch.channels_last)


def _rows(like: Tensor, channels) -> Tensor:
    return _image(like, channels, *like.shape[2:])


def _wide(like: Tensor, *size) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=like.device)


def _statistics(like: Tensor, channels, wanted: bool) -> tuple[Tensor, Tensor]:
    size = channels if wanted else 0
    return _wide(like, size), _wide(like, size)


def _sum(like: Tensor, channels, want_mask: bool, want_stats: bool) -> tuple[Tensor, ...]:
    count, _, height, width = like.shape
    size = count * height * width if want_mask else 0, (channels + 7) // 8
    mask = torch.empty(size, dtype=torch.uint8, device=like.device)
    return _rows(like, channels), mask, *_statistics(like, channels, want_stats)


def _apply(z, *rest):
    return _sum(z, z.shape[1], *rest[-2:])


def _expand(x, x_scale, x_shift, x_relu, weight, *rest):
    return _sum(x, weight.shape[0], *rest[16:18])


def _bn_act(z, *rest):
    return _rows(z, z.shape[1])


def _bn_act_backward(dy, *rest):
    return _rows(dy, dy.shape[1]), _wide(dy, dy.shape[1]), _wide(dy, dy.shape[1])


def _bn_stats(z):
    return _statistics(z, z.shape[1], True)


def _conv_stats(x, x_scale, x_shift, x_relu, weight, want_stats, tf32=False):
    return _rows(x, weight.shape[0]), *_statistics(x, weight.shape[0], want_stats)


def _conv_depthwise(x, scale, shift, act, slope, weight, stride, padding, dilation, height, width, want_stats):
    return _image(x, x.shape[1], height, width), *_statistics(x, x.shape[1], want_stats)


def _conv_depthwise_dgrad(dout, *rest):
    return _image(dout, dout.shape[1], *rest[10:12])


def _conv_depthwise_wgrad(dout, *rest):
    return _wide(dout, dout.shape[1], 1, *rest[14])


def _conv_window(
    x, x_scale, x_shift, x_relu, weight, stride, padding, dilation, out_height, out_width, want_stats
):  # fmt: skip
    outer = weight.shape[0]
    return _image(x, outer, out_height, out_width), *_statistics(x, outer, want_stats)


def _conv_window_dgrad(dout, *rest):
    weight, height, width = rest[9:12]
    return _image(dout, weight.shape[1], height, width)


def _conv_window_wgrad(dout, *rest):
    x, (rows, columns) = rest[9], rest[13]
    return _wide(dout, dout.shape[1], rows, columns, x.shape[1]).permute(0, 3, 1, 2)


def _covariance(x, x_scale, x_shift, x_relu, tf32=False):
    channels = x.shape[1]
    return _wide(x, channels), _wide(x, channels, channels)


def _expand_products(dout, mask, row_scale, factor, x, x_scale, x_shift, x_relu, mean, wg, tf32=False):
    outer, inner = dout.shape[1], x.shape[1]
    return _wide(x, outer, inner), _wide(x, outer), x.new_empty(0) if wg is None else _rows(x, inner)


def _expand_dgrad(dout, mask, row_scale, factor, u, x, *rest):
    return _rows(x, x.shape[1])


def _expand_stats(weight, mean, cov):
    return _statistics(weight, weight.shape[0], True)


def _expand_coefficients(products, sum_g, weight, wg, mean, cov, scale, invstd, count):
    outer, inner = weight.shape
    q, q_scale = torch.empty((inner, inner), dtype=weight.dtype, device=weight.device), _wide(weight)
    return _wide(weight, outer), _wide(weight, outer, inner), q, q_scale, _wide(weight, inner)


def _finalize(mean, var, gamma, beta, eps):
    return tuple(_wide(mean, mean.shape[0]) for _ in range(3))


def _update_running(mean, var, count, running_mean, running_var, tracked, momentum):
    return None


def _bn_reduce(dout, *rest):
    return tuple(_wide(dout, dout.shape[1]) for _ in range(5))


def _bn_relu_max_pool(x, scale, shift, relu, out_height, out_width, *window: Sequence[int]):
    size = x, x.shape[1], out_height, out_width
    return _image(*size), _image(*size, torch.uint8)


def _max_pool_backward(dout, argmax, x, *window: Sequence[int]):
    return _rows(x, x.shape[1])


def _bn_dgrad(dout, *rest):
    return _rows(dout, dout.shape[1])


def _conv_backward(dout, *rest):
    x, (want_input, want_weight) = rest[9], rest[18:20]
    outer, inner = dout.shape[1], x.shape[1]
    return _rows(x, inner) if want_input else x.new_empty(0), _wide(x, outer, inner) if want_weight else _wide(x, 0)


FAKES = {
    fake.__name__.removeprefix("_"): fake
    for fake in (
        _apply, _bn_act, _bn_act_backward, _bn_dgrad, _bn_reduce, _bn_relu_max_pool, _bn_stats, _conv_backward,
        _conv_depthwise, _conv_depthwise_dgrad, _conv_depthwise_wgrad, _conv_stats, _conv_window,
        _conv_window_dgrad, _conv_window_wgrad, _covariance, _expand, _expand_coefficients, _expand_dgrad,
        _expand_products, _expand_stats, _finalize, _max_pool_backward, _update_running,
    )
}  # fmt: skip
