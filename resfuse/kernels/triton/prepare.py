"""prepare: the kernels compute recipes in registers, so a recipe that they can read stays one. But products of many
channels compute it again for each column of their tiles: an activation is written out for them where that is quicker.
"""

from ..interface import Act, BNGrad, Grad, Masked, Norm
from . import _operands, _table
from ._launch import arch
from .apply import materialised


def prepare(operand: Act | Grad, outer: int = 0) -> Act | Grad:
    if isinstance(operand, Norm):
        channels = _operands.act(operand).x.shape[1]
        if operand.y is None and outer >= 2 * channels and _table.written_first(operand.z, arch(operand.z)):
            return operand._replace(y=materialised(operand))
    elif isinstance(operand, Masked | BNGrad):
        _operands.grad(operand)
    return operand
