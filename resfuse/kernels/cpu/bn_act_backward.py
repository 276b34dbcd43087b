"""bn_act_backward: BatchNorm's backward under an activation other than ReLU (`csrc/cpu/bn_act_backward.cpp`)."""

from torch import Tensor

from ... import _native
from .. import flat
from ..interface import BNContext, Norm
from . import _operands


def bn_act_backward(dy: Tensor, a: Norm, context: BNContext) -> tuple[Tensor, Tensor, Tensor]:
    _operands.check_rows(dy=dy, z=a.z)
    mean, invstd, _, batch = context
    return _native.load().bn_act_backward(
        dy, a.z, a.scale, a.shift, *flat.activation(a.act), mean, invstd, batch
    )
