"""bn_backward: the two sums in one pass; dz stays a recipe that its reader computes in cache."""

from torch import Tensor

from ... import _native
from ..interface import Act, BNContext, BNGrad, Grad, Norm, Reason, Unsupported
from . import _operands


def bn_backward(dy: Grad, a: Act | None, z: Tensor, context: BNContext) -> tuple[BNGrad, Tensor, Tensor]:
    if a is not None and not (isinstance(a, Norm) and a.relu and a.z.data_ptr() == z.data_ptr()):
        raise Unsupported([Reason("activation_given", "the ReLU's mask is made from z's own recipe")])
    _operands.check_rows(z=z)
    mean, invstd, gamma, batch = context
    if a is None:
        scale, shift = invstd if gamma is None else gamma.to(invstd.dtype) * invstd, None
    else:  # to the bit what made the activation
        scale, shift = a.scale, a.shift
    own_scale = None if shift is None else scale
    dbeta, dgamma = _native.load().bn_reduce(*_operands.masked(dy), z, own_scale, shift, mean, invstd)
    mean_dy = slope = None
    if batch:
        count = z.numel() // z.shape[1]
        mean_dy, slope = dbeta / count, dgamma * invstd / count
    return BNGrad(dy, z, mean, scale, mean_dy, slope, shift), dgamma, dbeta
