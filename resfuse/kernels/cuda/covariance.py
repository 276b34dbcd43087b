"""covariance: mean and biased covariance of the rows (`csrc/cuda/covariance.cu`)."""

from torch import Tensor

from .. import flat
from ..interface import Act
from ..rounding import rounds_to_tf32
from ._operands import check_views, vector
from ._ops import ops


def covariance(a: Act) -> tuple[Tensor, Tensor]:
    x, scale, shift, relu = flat.act(a)
    check_views(a=x)
    return ops().covariance(x, vector(scale), vector(shift), relu, rounds_to_tf32(x))
