"""avg_pool_backward: each gradient spread evenly over its window. Reads dout, writes da."""

import torch
from torch import Tensor

from ..interface import Act, Norm, Window


def avg_pool_backward(dout: Tensor, a: Act, window: Window, count_include_pad: bool) -> Tensor:
    size, stride, padding, _, ceil_mode = window
    like = a.z if isinstance(a, Norm) else a
    return torch.ops.aten.avg_pool2d_backward(
        dout, like, size, stride, padding, ceil_mode, count_include_pad, None
    )
