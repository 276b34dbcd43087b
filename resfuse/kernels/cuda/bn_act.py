"""bn_act: BatchNorm's affine map and an activation other than ReLU (`csrc/cuda/bn_act.cu`)."""

from torch import Tensor

from .. import flat
from ..interface import Norm
from ._operands import check_rows, vector
from ._ops import ops


def bn_act(a: Norm) -> Tensor:
    check_rows(z=a.z)
    return ops().bn_act(a.z, vector(a.scale), vector(a.shift), *flat.activation(a.act))
