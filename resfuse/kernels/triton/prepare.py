"""prepare: the kernels compute recipes in registers, so a recipe that they can read stays one."""

from ..interface import Act, BNGrad, Grad, Masked, Norm
from . import _operands


def prepare(operand: Act | Grad) -> Act | Grad:
    if isinstance(operand, Norm):
        _operands.act(operand)
    elif isinstance(operand, Masked | BNGrad):
        _operands.grad(operand)
    return operand
