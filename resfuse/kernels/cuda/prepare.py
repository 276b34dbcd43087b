"""prepare: the kernels compute recipes in registers, so a recipe that they can read stays one."""

from .. import flat
from ..interface import Act, BNGrad, Grad, Masked, Norm
from ._operands import check_rows, check_views


def prepare(operand: Act | Grad, outer: int = 0) -> Act | Grad:
    if isinstance(operand, Norm):
        check_views(a=operand.z)
    elif isinstance(operand, Masked | BNGrad):
        check_rows(g=flat.gradient(operand)[0], z=operand.z if isinstance(operand, BNGrad) else None)
    return operand
