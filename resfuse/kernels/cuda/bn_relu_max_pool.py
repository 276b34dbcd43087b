"""bn_relu_max_pool: maxima over windows, the activation never stored (`csrc/cuda/bn_relu_max_pool.cu`)."""

from torch import Tensor

from ..interface import Norm, Window
from ._operands import check_rows, vector
from ._ops import ops


def bn_relu_max_pool(a: Norm, window: Window) -> tuple[Tensor, Tensor]:
    check_rows(z=a.z)
    scale, shift = vector(a.scale), vector(a.shift)
    return ops().bn_relu_max_pool(a.z, scale, shift, a.relu, *window.spatial(a.z.shape[2:]), *window[:4])
