"""bn_dgrad: scale * (dy - mean_dy - (z - mean) * slope). Reads dy and z, writes dz."""

import torch
from torch import Tensor

from ..interface import BNGrad, wide
from ._rows import chunks, empty_image, rows


def affine(z: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * z + shift, rounded once: BatchNorm's own kernel with the statistics of no change."""
    z = z.contiguous(memory_format=torch.channels_last)
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    return torch.native_batch_norm(z, scale, shift, zero, one, False, 0.0, 0.0)[0]


def bn_dgrad(grad: BNGrad) -> Tensor:
    dy, z = rows(grad.dy), rows(grad.z)
    out = empty_image(grad.dy, dy.shape[1])
    dz = rows(out)
    for part in chunks(*dy.shape, dy.device):
        centred = z[part].to(wide(z.dtype)) - grad.mean
        dz[part] = (dy[part] - grad.mean_dy - centred * grad.slope) * grad.scale
    return out
