"""bn_dgrad: scale * (dy - mean_dy - (z - mean) * slope). Reads dy and z, writes dz."""

from torch import Tensor

from ..interface import BNGrad
from .select import written


def bn_dgrad(grad: BNGrad) -> Tensor:
    return written(grad)
