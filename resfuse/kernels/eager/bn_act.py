"""bn_act: BatchNorm's affine map in wide precision, then torch's activation. Reads z, writes y."""

import torch.nn.functional as F
from torch import Tensor

from ..interface import Norm, wide
from ._rows import dense

FORWARD = {
    "leaky_relu": lambda v, slope: F.leaky_relu(v, slope),
    "relu6": lambda v, _: F.relu6(v),
    "silu": lambda v, _: F.silu(v),
    "hardswish": lambda v, _: F.hardswish(v),
}


def bn_act(a: Norm) -> Tensor:
    return FORWARD[a.act.kind](before(a), a.act.slope).to(a.z.dtype)


def before(a: Norm) -> Tensor:
    """The activation's argument, wide."""
    z = dense(a.z)
    return z.to(wide(z.dtype)) * a.scale[:, None, None] + a.shift[:, None, None]
