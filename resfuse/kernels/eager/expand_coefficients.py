"""expand_coefficients: dgamma, dweight, Q and c from P and sum(g): C-length and [K, C] algebra, wide."""

import torch
from torch import Tensor

from ..interface import Affine
from ._rows import as_read


def expand_coefficients(
    products: Tensor, sum_g: Tensor, weight: Tensor, wg: Tensor, mean: Tensor, cov: Tensor, affine: Affine, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    w, exact = as_read(weight), products.dtype
    scale, _, invstd = (t.to(w.dtype) for t in affine)
    p = products.to(w.dtype)
    dgamma = invstd * (p * w).sum(1)
    dweight = scale[:, None] * (p - (dgamma * invstd)[:, None] * (w @ cov.to(w.dtype)))
    q = w.t() @ (w * (scale * invstd * dgamma / count)[:, None])
    q_scale = _power_of_two(q.abs().amax())
    q = (q / q_scale).to(weight.dtype)
    # c from the rounded operands: from unrounded ones it would bias the column sums of the gradient.
    c = (sum_g / count).to(w.dtype) @ wg.to(w.dtype) - q_scale * (mean.to(w.dtype) @ q.to(w.dtype))
    return dgamma.to(exact), dweight.to(exact), q, q_scale.to(exact), c.to(exact)


def _power_of_two(largest: Tensor) -> Tensor:
    """The power of two at or below a positive finite scalar, else 1; no synchronisation."""
    power = torch.exp2(largest.log2().floor())
    return torch.where((power > 0) & power.isfinite(), power, torch.ones_like(power))
