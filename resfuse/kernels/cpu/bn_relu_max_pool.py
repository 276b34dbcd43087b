"""bn_relu_max_pool: maxima over windows, the activation never stored (`csrc/cpu/bn_relu_max_pool.cpp`)."""

from torch import Tensor

from ... import _native
from ..interface import Norm, Window
from ._operands import check_rows


def bn_relu_max_pool(a: Norm, window: Window) -> tuple[Tensor, Tensor]:
    check_rows(z=a.z)
    height, width = (outputs(window, side, a.z.shape[2 + side]) for side in (0, 1))
    size, stride, padding, dilation, _ = window
    return _native.load().bn_relu_max_pool(
        a.z, a.scale, a.shift, True, height, width, size, stride, padding, dilation
    )


def outputs(window: Window, side: int, length: int) -> int:
    """Windows along one side, as torch counts them: in ceil_mode the last may hang over, but must begin inside."""
    size, stride, padding, dilation = (pair[side] for pair in window[:4])
    room = length + 2 * padding - dilation * (size - 1) - 1
    count = (-(-room // stride) if window.ceil_mode else room // stride) + 1
    return count - 1 if window.ceil_mode and (count - 1) * stride >= length + padding else count
