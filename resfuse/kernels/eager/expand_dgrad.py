"""expand_dgrad: da = g @ Wg - q_scale * (a @ q) - c, rounded once, masked by a's ReLU where asked.

Reads u (or g) and a, writes da.
"""

import torch
from torch import Tensor

from ..interface import Act, Grad, wide
from ._rows import dense, empty_image, parts, product
from .prepare import prepare


def expand_dgrad(
    g: Grad, u: Tensor | None, a: Act, wg: Tensor,
    q: Tensor | None, q_scale: Tensor | None, c: Tensor | None, relu: bool, mean: Tensor | None,
) -> Tensor:
    y = dense(prepare(a))
    da = empty_image(y, y.shape[1])
    for da_part, y_part, source in parts(da, y, prepare(g) if u is None else u):
        value = product(source, wg) if u is None else source.to(wide(y.dtype))
        if q is not None:
            value = product(y_part, q, da_part).mul_(-q_scale).add_(value).sub_(c)
        if relu:
            value = torch.ops.aten.threshold_backward(value, y_part.to(value.dtype), 0)
        da_part.copy_(value)
    return da
