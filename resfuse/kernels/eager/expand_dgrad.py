"""expand_dgrad: da = g @ Wg - a @ Q - c, rounded once, masked by a's ReLU where asked. Reads u (or g) and a."""

import torch
from torch import Tensor

from ..interface import Act, Grad, wide
from ._rows import chunks, empty_image, product, rows
from .prepare import prepare


def expand_dgrad(
    g: Grad, u: Tensor | None, a: Act, wg: Tensor, q: Tensor | None, c: Tensor | None, relu: bool
) -> Tensor:
    a = prepare(a)
    y = rows(a)
    g_rows = rows(prepare(g)) if u is None else rows(u)
    out = empty_image(a, y.shape[1])
    da = rows(out)
    for part in chunks(*y.shape, y.device):
        value = product(g_rows[part], wg) if u is None else g_rows[part].to(wide(y.dtype))
        if q is not None:
            value = value - product(y[part], q) - c
        da[part] = torch.ops.aten.threshold_backward(value, y[part].to(value.dtype), 0) if relu else value
    return out
