"""expand_coefficients: dgamma, dweight, Q and c from P and sum(g): C-length and [K, C] algebra, wide."""

from torch import Tensor

from ..interface import Affine
from ._rows import as_read


def expand_coefficients(
    products: Tensor, sum_g: Tensor, weight: Tensor, wg: Tensor, mean: Tensor, cov: Tensor, affine: Affine, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    w, scale, invstd = as_read(weight).to(cov.dtype), affine.scale, affine.invstd
    dgamma = invstd * (products * w).sum(1)
    dweight = scale[:, None] * (products - (dgamma * invstd)[:, None] * (w @ cov))
    q = (w.t() @ (w * (scale * invstd * dgamma / count)[:, None])).to(weight.dtype)
    # c from the rounded operands: from unrounded ones it would bias the column sums of the gradient.
    c = (sum_g / count).to(cov.dtype) @ wg.to(cov.dtype) - mean.to(cov.dtype) @ q.to(cov.dtype)
    exact = products.dtype
    return dgamma.to(exact), dweight.to(exact), q, c.to(exact)
