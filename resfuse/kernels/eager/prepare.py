"""prepare: this set reads tensors, so a recipe is computed once and its readers share the result."""

from torch import Tensor

from ..interface import Act, BNGrad, Grad, Masked, Norm
from .bn_act import bn_act
from .bn_dgrad import affine, bn_dgrad
from .select import select


def prepare(operand: Act | Grad, outer: int = 0) -> Tensor:
    if isinstance(operand, Norm):
        if operand.act is not None:
            return bn_act(operand)
        y = affine(operand.z, operand.scale, operand.shift)
        return y.relu_() if operand.relu else y
    if isinstance(operand, Masked):
        return select(operand)
    if isinstance(operand, BNGrad):
        return bn_dgrad(operand)
    return operand
