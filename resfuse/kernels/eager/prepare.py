"""prepare: this set reads tensors, so a recipe is computed once and its readers share the result."""

import torch
from torch import Tensor

from ..interface import Act, BNGrad, Grad, Masked, Norm
from ._rows import dense, empty_image, parts, unpack_mask
from .bn_dgrad import affine, bn_dgrad


def prepare(operand: Act | Grad) -> Tensor:
    if isinstance(operand, Norm):
        y = affine(operand.z, operand.scale, operand.shift)
        return y.relu_() if operand.relu else y
    if isinstance(operand, Masked):
        return _select(operand)
    if isinstance(operand, BNGrad):
        return bn_dgrad(operand)
    return operand


def _select(grad: Masked) -> Tensor:
    dout = dense(grad.dout)
    g = empty_image(dout, dout.shape[1])
    for g_part, dout_part, mask in parts(g, dout, grad.mask):
        g_part.copy_(torch.ops.aten.threshold_backward(dout_part, unpack_mask(mask, dout_part), 0))
    return g
