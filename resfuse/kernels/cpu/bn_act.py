"""bn_act: BatchNorm's affine map and an activation other than ReLU (`csrc/cpu/bn_act.cpp`)."""

from torch import Tensor

from ... import _native
from .. import flat
from ..interface import Norm
from . import _operands


def bn_act(a: Norm) -> Tensor:
    _operands.check_views(z=a.z)
    return _native.load().bn_act(a.z, a.scale, a.shift, *flat.activation(a.act))
