"""expand_products: P = g.T @ (a - mean), sum(g) and, where a block holds all columns, u = g @ Wg
(`csrc/cuda/expand_products.cu`)."""

import torch
from torch import Tensor

from .. import flat
from ..interface import Act, Grad
from ..rounding import rounds_to_tf32
from ._operands import check_rows, check_views, vector
from ._ops import ops

MOST_OUTER, MOST_INNER = 256, 64  # columns of g and of a with which u comes in the pass: a bottleneck of stage 1


def expand_products(
    g: Grad, a: Act, mean: Tensor | None, wg: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    operands, (x, scale, shift, relu) = flat.masked(g), flat.act(a)
    check_rows(g=operands[0])
    check_views(a=x)
    if wg is not None and not _gives_u(operands[0], x, wg):
        wg = None
    activation = x, vector(scale), vector(shift), relu
    products, total, u = ops().expand_products(*operands, *activation, vector(mean), wg, rounds_to_tf32(x))
    return products, total, None if wg is None else u


def _gives_u(g: Tensor, x: Tensor, wg: Tensor) -> bool:
    """Elsewhere u is left to `expand_dgrad`."""
    (outer, inner), read = wg.shape, (g, x, wg)
    return (
        x.dtype != torch.float32 and outer <= MOST_OUTER and inner <= MOST_INNER and outer % 8 == inner % 8 == 0
        and x.is_contiguous(memory_format=torch.channels_last) and wg.is_contiguous()
        and all(t.data_ptr() % 16 == 0 for t in read)
    )  # fmt: skip
