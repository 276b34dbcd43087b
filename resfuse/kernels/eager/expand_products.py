"""expand_products: P = g.T @ (a - mean), sum(g) and u = g @ Wg in one pass over g and a, part by part."""

import torch
from torch import Tensor

from ..interface import Act, Grad, wide
from ._rows import dense, empty_image, parts, product
from .prepare import prepare


def expand_products(
    g: Grad, a: Act, mean: Tensor | None, wg: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    g, y = prepare(g), dense(prepare(a))
    exact, outer, inner = wide(y.dtype), g.shape[1], y.shape[1]
    products = torch.zeros(outer, inner, dtype=exact, device=y.device)
    total = torch.zeros(outer, dtype=torch.float64, device=y.device)
    u = None if wg is None else empty_image(y, inner, exact)
    wg = None if wg is None else wg.to(exact)
    for g_part, y_part, *u_part in parts(g, y, *([] if u is None else [u])):
        g_part = g_part.to(exact)
        products.addmm_(g_part.t(), y_part.to(exact) if mean is None else y_part - mean.to(exact))
        total += g_part.sum(0, dtype=torch.float64)
        if u_part:
            product(g_part, wg, u_part[0])
    return products, total.to(exact), u
