"""expand_coefficients: dgamma, dweight, Q and c from P and sum(g) (`csrc/cuda/expand_coefficients.cu`)."""

from torch import Tensor

from ..interface import Affine
from ..nvidia import check_stored
from . import _ops
from ._operands import as_read, vector


def expand_coefficients(
    products: Tensor, sum_g: Tensor, weight: Tensor, wg: Tensor, mean: Tensor, cov: Tensor, affine: Affine, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_stored(_ops.instead, weight=weight, wg=wg)
    operands = vector(products), vector(sum_g), as_read(weight), as_read(wg), vector(mean), vector(cov)
    return _ops.ops().expand_coefficients(*operands, vector(affine.scale), vector(affine.invstd), count)
