"""bn_act_backward: BatchNorm's backward under an activation other than ReLU (`csrc/cuda/bn_act_backward.cu`)."""

from torch import Tensor

from .. import flat
from ..interface import BNContext, Norm
from ._operands import check_rows, vector
from ._ops import ops


def bn_act_backward(dy: Tensor, a: Norm, context: BNContext) -> tuple[Tensor, Tensor, Tensor]:
    check_rows(dy=dy, z=a.z)
    scale, shift, mean, invstd = map(vector, (a.scale, a.shift, context.mean, context.invstd))
    return ops().bn_act_backward(dy, a.z, scale, shift, *flat.activation(a.act), mean, invstd, context.batch)
