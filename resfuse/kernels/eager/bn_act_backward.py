"""bn_act_backward: torch's gradient of the activation, then that of BatchNorm."""

import torch
from torch import Tensor

from ..interface import BNContext, Norm
from ._rows import dense
from .bn_act import before
from .bn_backward import bn_backward

aten = torch.ops.aten
BACKWARD = {
    "leaky_relu": lambda dy, v, slope: aten.leaky_relu_backward(dy, v, slope, False),
    "relu6": lambda dy, v, _: aten.hardtanh_backward(dy, v, 0.0, 6.0),
    "silu": lambda dy, v, _: aten.silu_backward(dy, v),
    "hardswish": lambda dy, v, _: aten.hardswish_backward(dy, v),
}


def bn_act_backward(dy: Tensor, a: Norm, context: BNContext) -> tuple[Tensor, Tensor, Tensor]:
    v = before(a)
    d = BACKWARD[a.act.kind](dense(dy).to(v.dtype), v, a.act.slope)
    return bn_backward(d.to(dy.dtype), None, a.z, context)
