"""bn_relu_max_pool: maxima over windows, the activation never stored (`csrc/cpu/bn_relu_max_pool.cpp`)."""

from torch import Tensor

from ... import _native
from ..interface import Norm, Window
from ._operands import check_rows


def bn_relu_max_pool(a: Norm, window: Window) -> tuple[Tensor, Tensor]:
    check_rows(z=a.z)
    height, width = window.spatial(a.z.shape[2:])
    size, stride, padding, dilation, _ = window
    return _native.load().bn_relu_max_pool(
        a.z, a.scale, a.shift, True, height, width, size, stride, padding, dilation
    )
