"""bn_backward: ReLU's mask, then torch's BatchNorm backward, which gives the sums and dz together."""

import torch
from torch import Tensor

from ..interface import Act, BNContext, Grad, Summed
from .bn_dgrad import affine
from .bn_reduce import bn_reduce, native_backward
from .prepare import prepare


def bn_backward(dy: Grad | Summed, a: Act | None, z: Tensor, context: BNContext) -> tuple[Tensor, Tensor, Tensor]:
    dy = prepare(dy.dy if isinstance(dy, Summed) else dy)
    if a is not None:
        dy = torch.ops.aten.threshold_backward(dy, prepare(a), 0)
        del a
    mean, invstd, gamma, batch = context
    if batch:
        return native_backward(dy, z, gamma, mean, invstd, (True, True, True))
    dbeta, dgamma = bn_reduce(dy, z, mean, invstd)
    scale = invstd if gamma is None else gamma.to(invstd.dtype) * invstd
    return affine(dy, scale, torch.zeros_like(scale)), dgamma, dbeta
