"""select: scale * row_scale[n] * (dout where mask else 0). Reads dout and the mask, writes g."""

import torch
from torch import Tensor

from ..interface import Masked, wide
from ._rows import dense, empty_image, parts, unpack_mask


def select(grad: Masked) -> Tensor:
    dout = dense(grad.dout)
    factor = None
    if grad.row_scale is not None:
        factor = (grad.row_scale * grad.scale).repeat_interleave(dout.shape[2] * dout.shape[3])[:, None]
    elif grad.scale != 1:
        factor = torch.full((dout.numel() // dout.shape[1], 1), grad.scale, dtype=wide(dout.dtype), device=dout.device)
    if grad.mask is None and factor is None:
        return dout
    g = empty_image(dout, dout.shape[1])
    given = {name: t for name, t in (("mask", grad.mask), ("factor", factor)) if t is not None}
    for g_part, value, *others in parts(g, dout, *given.values()):
        rows = dict(zip(given, others, strict=True))
        if "mask" in rows:
            value = torch.ops.aten.threshold_backward(value, unpack_mask(rows["mask"], value), 0)
        if "factor" in rows:
            value = value * rows["factor"]
        g_part.copy_(value)
    return g
