"""bn_dgrad: scale * (dy - mean_dy - (z - mean) * slope). Reads dy and z, writes dz."""

import torch
from torch import Tensor

from ..interface import BNGrad, Masked, wide
from ._rows import dense, empty_image, parts
from .select import select


def affine(z: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * z + shift, rounded once: BatchNorm's own kernel with the statistics of no change."""
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    return torch.native_batch_norm(dense(z), scale, shift, zero, one, False, 0.0, 0.0)[0]


def bn_dgrad(grad: BNGrad) -> Tensor:
    dy = dense(select(grad.dy) if isinstance(grad.dy, Masked) else grad.dy)
    if grad.shift is not None:
        dy = torch.ops.aten.threshold_backward(dy, affine(grad.z, grad.scale, grad.shift), 0)
    dz = empty_image(dy, dy.shape[1])
    for dz_part, dy_part, z in parts(dz, dy, grad.z):
        if grad.slope is None:
            dz_part.copy_(dy_part * grad.scale)
        else:
            centred = z.to(wide(z.dtype)) - grad.mean
            dz_part.copy_((dy_part - grad.mean_dy - centred * grad.slope) * grad.scale)
    return dz
