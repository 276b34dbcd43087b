"""bn_relu_max_pool_backward: dout to where the maxima were (`csrc/cuda/bn_relu_max_pool.cu`), then `bn_backward`."""

from torch import Tensor

from ..interface import BNContext, BNGrad, Norm, Window
from ._operands import check_rows
from ._ops import ops
from .bn_backward import bn_backward


def bn_relu_max_pool_backward(
    dout: Tensor, argmax: Tensor, a: Norm, window: Window, context: BNContext
) -> tuple[BNGrad, Tensor, Tensor]:
    check_rows(dout=dout, z=a.z)
    dy = ops().max_pool_backward(dout, argmax, a.z, *window[:4])
    return bn_backward(dy, a._replace(relu=True), a.z, context)
