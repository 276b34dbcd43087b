"""bn_dgrad: scale * (dy - mean_dy - (z - mean) * slope) as a tensor (`csrc/cuda/bn_dgrad.cu`)."""

from torch import Tensor

from .. import flat
from ..interface import BNGrad
from ._operands import check_rows
from ._ops import ops


def bn_dgrad(grad: BNGrad) -> Tensor:
    operands = flat.gradient(grad)
    check_rows(g=operands[0], z=grad.z)
    return ops().bn_dgrad(*operands)
