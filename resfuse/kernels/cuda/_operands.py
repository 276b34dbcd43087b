"""What the CUDA operators cannot read, refused before anything has run."""

from __future__ import annotations

import torch
from torch import Tensor

from ..interface import Reason, Unsupported
from ..nvidia import check_stored
from ..rounding import round_to_tf32, rounds_to_tf32
from . import _ops


def check_rows(**tensors: Tensor | None) -> None:
    """Raise Unsupported unless each tensor is of a stored dtype, on a GPU and dense in channels_last."""
    _check(tensors, False)


def check_views(**tensors: Tensor | None) -> None:
    """As `check_rows`, strided views of channels_last too."""
    _check(tensors, True)


def vector(t: Tensor | None) -> Tensor | None:
    """A vector as the operators take it: float32, one value after the other."""
    return t if t is None else t.float().contiguous()


def as_read(weight: Tensor) -> Tensor:
    """A weight with the values that a product of it reads, one row after the other."""
    rounded = round_to_tf32(weight) if rounds_to_tf32(weight) else weight
    return rounded.contiguous()


def _check(tensors: dict[str, Tensor | None], views: bool) -> None:
    check_stored(_ops.instead, **tensors)
    for name, t in tensors.items():
        if t is None or t.is_contiguous(memory_format=torch.channels_last) or (views and t.stride(1) == 1):
            continue
        kinds = "channels_last, nor a strided view of it" if views else "dense in channels_last"
        raise Unsupported([Reason("layout", f"{name} is not {kinds}")])
