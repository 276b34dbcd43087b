"""bn_relu_max_pool: maxima of relu(scale * z + shift) over windows, and where they are. Reads z, writes the maxima."""

import torch
from torch import Tensor

from ..interface import Norm, Window
from .prepare import prepare


def bn_relu_max_pool(a: Norm, window: Window) -> tuple[Tensor, Tensor]:
    y = prepare(a._replace(relu=True))
    out, flat = torch.nn.functional.max_pool2d(y, *window, return_indices=True)
    (top, left), (down, right) = corners(out, window), window.dilation
    row, column = flat // y.shape[3], flat % y.shape[3]
    argmax = (row - top) // down * window.size[1] + (column - left) // right
    return out, argmax.to(torch.uint8)


def corners(out: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """The row [P, 1] and the column [1, Q] where each output's window begins; negative in the padding."""
    rows, columns = (
        torch.arange(count, device=out.device) * step - pad
        for count, step, pad in zip(out.shape[2:], window.stride, window.padding, strict=True)
    )
    return rows[:, None], columns[None, :]
