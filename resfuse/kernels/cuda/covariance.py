"""covariance: mean and biased covariance of the rows, in 16 bits (`csrc/cuda/covariance.cu`)."""

from torch import Tensor

from .. import flat
from ..interface import Act
from ._operands import check_short, vector
from ._ops import ops


def covariance(a: Act) -> tuple[Tensor, Tensor]:
    x, scale, shift, relu = flat.act(a)
    check_short(a=x)
    return ops().covariance(x, vector(scale), vector(shift), relu)
