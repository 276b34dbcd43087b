"""avg_pool: torch's average pooling. Reads a, writes the averages."""

import torch
from torch import Tensor

from ..interface import Act, Window
from .apply import materialised


def avg_pool(a: Act, window: Window, count_include_pad: bool) -> Tensor:
    size, stride, padding, _, ceil_mode = window
    return torch.nn.functional.avg_pool2d(materialised(a), size, stride, padding, ceil_mode, count_include_pad)
