"""bn_backward: the two sums in one pass; dz stays a recipe that its reader computes in cache."""

from torch import Tensor

from ... import _native
from .. import flat
from ..interface import Act, BNContext, BNGrad, Grad, Norm, Reason, Summed, Unsupported
from . import _operands


def bn_backward(dy: Grad | Summed, a: Act | None, z: Tensor, context: BNContext) -> tuple[BNGrad, Tensor, Tensor]:
    if a is not None and not (isinstance(a, Norm) and a.relu and a.z.data_ptr() == z.data_ptr()):
        raise Unsupported([Reason("activation_given", "the ReLU's mask is made from z's own recipe")])
    _operands.check_rows(z=z)
    dy = dy.dy if isinstance(dy, Summed) else dy
    mean, invstd, gamma, batch = context
    # A given activation's own scale and shift: its mask is then made to the bit as it was.
    scale, shift = (None, None) if a is None else (a.scale, a.shift)
    gamma = flat.vector(gamma)
    operands = *_operands.masked(dy), z, scale, shift, mean, invstd, gamma
    dbeta, dgamma, mean_dy, slope, bn_scale = _native.load().bn_reduce(*operands)
    if not batch:
        mean_dy = slope = None
    return BNGrad(dy, z, mean, bn_scale if scale is None else scale, mean_dy, slope, shift), dgamma, dbeta
