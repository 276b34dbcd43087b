"""timm's stochastic depth as a factor of each sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..arguments import autocast_enabled
from .mixin import wrapped

DROP_PATH = "timm.layers.drop", "DropPath"


def drops_rows(module: nn.Module) -> bool:
    """Whether it is what `row_scale` reads."""
    return (type(module).__module__, type(module).__qualname__) == DROP_PATH and wrapped("drop_path", module) is None


def row_scale(drop_path: nn.Module, x: Tensor, weight: Tensor) -> Tensor | None:
    """What it would multiply each sample of x by, [N], drawn as there, None for nothing; weight: the last
    convolution's, whose dtype the branch has outside autocast."""
    if drop_path.drop_prob == 0 or not drop_path.training:
        return None
    keep = 1 - drop_path.drop_prob
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if autocast_enabled(device) else weight.dtype
    drawn = torch.empty((len(x), 1, 1, 1), dtype=dtype, device=x.device).bernoulli_(keep)
    if keep > 0 and drop_path.scale_by_keep:
        drawn.div_(keep)
    return drawn.flatten()
