"""bn_relu_max_pool_backward: dout to where the maxima were (`csrc/cpu/bn_relu_max_pool.cpp`), then `bn_backward`."""

from torch import Tensor

from ... import _native
from ..interface import BNContext, BNGrad, Norm, Window
from ._operands import check_rows
from .bn_backward import bn_backward


def bn_relu_max_pool_backward(
    dout: Tensor, argmax: Tensor, a: Norm, window: Window, context: BNContext
) -> tuple[BNGrad, Tensor, Tensor]:
    check_rows(dout=dout, z=a.z)
    size, stride, padding, dilation, _ = window
    dy = _native.load().max_pool_backward(dout, argmax, a.z, size, stride, padding, dilation)
    return bn_backward(dy, a._replace(relu=True), a.z, context)
