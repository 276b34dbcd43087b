"""prepare: this set reads tensors, so a recipe is computed once and its readers share the result."""

import torch
from torch import Tensor

from ..interface import Act, BNGrad, Grad, Masked, Norm
from ._rows import image, rows, unpack_mask
from .bn_dgrad import affine, bn_dgrad


def prepare(operand: Act | Grad) -> Tensor:
    if isinstance(operand, Norm):
        y = affine(operand.z, operand.scale, operand.shift)
        return y.relu_() if operand.relu else y
    if isinstance(operand, Masked):
        dout = rows(operand.dout)
        kept = unpack_mask(operand.mask, dout.shape[1])
        return image(torch.where(kept, dout, dout.new_zeros(())), operand.dout)
    if isinstance(operand, BNGrad):
        return bn_dgrad(operand)
    return operand
