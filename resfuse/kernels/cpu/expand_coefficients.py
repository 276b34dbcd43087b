"""expand_coefficients: dgamma, dweight, Q and c from P and sum(g) (`csrc/cpu/expand_stats.cpp`)."""

from torch import Tensor

from ... import _native
from ..interface import Affine
from ._operands import check_stored, check_vectors


def expand_coefficients(
    products: Tensor, sum_g: Tensor, weight: Tensor, wg: Tensor, mean: Tensor, cov: Tensor, affine: Affine, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_stored(weight=weight, wg=wg)
    scale, _, invstd = affine
    check_vectors(products=products, sum_g=sum_g, mean=mean, cov=cov, scale=scale, invstd=invstd)
    operands = products, sum_g, weight, wg, mean, cov, scale, invstd
    return _native.load().expand_coefficients(*operands, count)
