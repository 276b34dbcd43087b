"""bn_backward: the two sums in one pass; dz stays a recipe that its reader computes in registers."""

from torch import Tensor

from .. import flat
from ..interface import Act, BNContext, BNGrad, Grad, Norm, Reason, Summed, Unsupported
from ._operands import check_rows, vector
from ._ops import ops


def bn_backward(dy: Grad | Summed, a: Act | None, z: Tensor, context: BNContext) -> tuple[BNGrad, Tensor, Tensor]:
    if a is not None and not (isinstance(a, Norm) and a.relu and a.z.data_ptr() == z.data_ptr()):
        raise Unsupported([Reason("activation_given", "the ReLU's mask is made from z's own recipe")])
    dy = dy.dy if isinstance(dy, Summed) else dy
    operands, (mean, invstd, gamma, batch) = flat.masked(dy), context
    check_rows(dy=operands[0], z=z)
    # A given activation's own scale and shift: its mask is then made to the bit as it was.
    scale, shift = (None, None) if a is None else (a.scale, a.shift)
    dbeta, dgamma, mean_dy, slope, own = ops().bn_reduce(*operands, z, scale, shift, mean, invstd, vector(gamma))
    if not batch:
        mean_dy = slope = None
    return BNGrad(dy, z, mean, own if scale is None else scale, mean_dy, slope, shift), dgamma, dbeta
