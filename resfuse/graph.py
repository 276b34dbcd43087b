"""Calls inside torch.compile: leaves of Dynamo's graph, which AOTAutograd traces through.

Dynamo reads modules and guards on their settings; from here on plain Python runs, on tensors without values, with the
operators of `functions/ops.py` in the place of kernels. Importing this module imports Dynamo.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from . import calls
from .functions import ops


def autocast(x: Tensor) -> tuple[str, torch.dtype | None]:
    """Device type and autocast's dtype there, None where it is off: Dynamo may switch it off for leaves."""
    device = x.device.type
    return device, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _restored(state: tuple[str, torch.dtype | None]) -> AbstractContextManager:
    device, dtype = state
    return torch.autocast(device, dtype=dtype, enabled=dtype is not None)


@torch.compiler.allow_in_graph
def block(state, parts, bn, convs, shortcut, *, scale=1.0, **options):
    """`calls.block`."""
    with _restored(state):
        return calls.block(parts, bn, convs, shortcut, scale=float(scale), **options, steps=ops.BLOCK)


@torch.compiler.allow_in_graph
def bn_relu(state, x, bn, pool, stats, **options):
    """`calls.bn_relu`."""
    with _restored(state):
        return calls.bn_relu(x, bn, pool, stats, **options, steps=ops.BN_RELU)
