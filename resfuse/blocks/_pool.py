"""Pools as plans read them."""

from __future__ import annotations

from torch import nn

from ..kernels.interface import Reason, Window
from .mixin import plain_refusal, wrapped


def pool_refusal(name: str, pool: nn.Module) -> Reason | None:
    """Why a module is neither a plain max pool nor nothing."""
    if type(pool) is nn.Identity:
        return plain_refusal(name, pool, nn.Identity)
    reason = plain_refusal(name, pool, nn.MaxPool2d)
    if reason is None and pool.return_indices:
        return Reason("pool", f"{name} returns indices")
    return reason


def window(pool: nn.Module) -> Window | None:
    if type(pool) is nn.Identity:
        return None
    return Window(*(_pair(v) for v in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)), pool.ceil_mode)


def is_plain_average(module: nn.Module) -> bool:
    """Whether `average_window` reads all that it does."""
    return type(module) is nn.AvgPool2d and module.divisor_override is None and wrapped("pool", module) is None


def average_window(pool: nn.AvgPool2d) -> Window:
    return Window(*(_pair(v) for v in (pool.kernel_size, pool.stride, pool.padding)), ceil_mode=pool.ceil_mode)


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
