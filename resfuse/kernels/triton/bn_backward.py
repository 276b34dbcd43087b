"""bn_backward: the two sums in one pass, if dy came without them; dz stays a recipe that its reader computes."""

from torch import Tensor

from ..interface import Act, BNContext, BNGrad, Grad, Norm, Reason, Summed, Unsupported
from . import _operands
from .bn_reduce import bn_vectors, partial_sums
from .select import written


def bn_backward(dy: Grad | Summed, a: Act | None, z: Tensor, context: BNContext) -> tuple[BNGrad, Tensor, Tensor]:
    if a is not None and not (isinstance(a, Norm) and a.relu and a.z.is_set_to(z)):
        raise Unsupported([Reason("activation_given", "the ReLU's mask is made from z's own recipe")])
    if isinstance(dy, Summed):
        dy, sums = dy
    else:
        dy = written(dy) if isinstance(dy, BNGrad) else dy
        below = _operands.grad(dy)
        sums = partial_sums(below if a is None else below._replace(z=z, scale=a.scale, shift=a.shift), z, context.mean)
    dbeta, dgamma, mean_dy, slope, scale = bn_vectors(sums, _operands.rows(z), context)
    if not context.batch:
        mean_dy = slope = None
    # A given activation's own scale and shift: its mask is then made to the bit as it was.
    scale, shift = (scale, None) if a is None else (a.scale, a.shift)
    return BNGrad(dy, z, context.mean, scale, mean_dy, slope, shift), dgamma, dbeta
