"""Batch statistics handed from the block that wrote a tensor to the one that normalises it, on the tensor itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.interface import Stats


def can_carry() -> bool:
    """Whether tensors carry them: not in inference mode, where writes to a tensor are not counted, and not in a graph,
    where they have no attributes."""
    return not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled()


def leave(out: Tensor, stats: Stats) -> Tensor:
    """out, with its statistics as it is now."""
    out._resfuse_stats = stats, out._version
    return out


def take(x: Tensor) -> Stats | None:
    """The statistics left on x, unless it has been written to since."""
    if torch.compiler.is_compiling():
        return None
    stats, version = getattr(x, "_resfuse_stats", (None, None))
    return stats if stats is not None and x._version == version and len(stats.mean) == x.shape[1] else None
