"""bn_relu_max_pool_backward: dout to where the maxima were, then BatchNorm's backward under its ReLU.

Reads dout, argmax and z, writes dz.
"""

import torch
from torch import Tensor

from ..interface import BNContext, Norm, Window
from ._rows import dense
from .bn_backward import bn_backward
from .bn_relu_max_pool import corners


def bn_relu_max_pool_backward(
    dout: Tensor, argmax: Tensor, a: Norm, window: Window, context: BNContext
) -> tuple[Tensor, Tensor, Tensor]:
    z = dense(a.z)
    (top, left), (down, right), columns = corners(dout, window), window.dilation, window.size[1]
    place = argmax.to(torch.int64)
    flat = (top + place // columns * down) * z.shape[3] + left + place % columns * right
    dy = torch.ops.aten.max_pool2d_with_indices_backward(dense(dout), z, *window, flat)
    return bn_backward(dy, a._replace(relu=True), z, context)
