"""expand_products: P = g.T @ (a - mean), sum(g) and u = g @ Wg in one pass over g and a, chunk by chunk."""

import torch
from torch import Tensor

from ..interface import Act, Grad, wide
from ._rows import chunks, image, rows
from .prepare import prepare


def expand_products(
    g: Grad, a: Act, mean: Tensor | None, wg: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    g, a = prepare(g), prepare(a)
    g_rows, y = rows(g), rows(a)
    exact = wide(y.dtype)
    (count, outer), inner = g_rows.shape, y.shape[1]
    products = torch.zeros(outer, inner, dtype=exact, device=y.device)
    total = torch.zeros(outer, dtype=torch.float64, device=y.device)
    u = None if wg is None else torch.empty(count, inner, dtype=exact, device=y.device)
    wg = None if wg is None else wg.to(exact)
    for part in chunks(count, outer, y.device):
        g_part = g_rows[part].to(exact)
        y_part = y[part].to(exact) if mean is None else y[part] - mean.to(exact)
        products.addmm_(g_part.t(), y_part)
        total += g_part.sum(0, dtype=torch.float64)
        if u is not None:
            torch.mm(g_part, wg, out=u[part])
    return products, total.to(exact), None if u is None else image(u, a)
