"""conv_stats: a 1x1 with the statistics of what it stores (`csrc/cuda/conv_stats.cu`); other windows by the vendor,
between passes of this set's."""

from torch import Tensor

from .. import flat
from ..interface import Act, Geometry, Stats
from ..rounding import rounds_to_tf32
from ..vendor import conv
from ._operands import check_views, vector
from ._ops import ops
from .apply import materialised
from .bn_stats import bn_stats


def conv_stats(a: Act, weight: Tensor, geometry: Geometry, stats: bool) -> tuple[Tensor, Stats | None]:
    if not is_product(weight, geometry):
        z = conv(materialised(a), weight, geometry)
        return z, bn_stats(z) if stats else None
    x, scale, shift, relu = flat.act(a)
    check_views(a=x)
    (down, right), matrix = geometry.stride, weight.flatten(1).contiguous()
    x = x[:, :, ::down, ::right]
    z, mean, var = ops().conv_stats(x, vector(scale), vector(shift), relu, matrix, stats, rounds_to_tf32(x))
    return z, Stats(mean, var) if stats else None


def is_product(weight: Tensor, geometry: Geometry) -> bool:
    """Whether a convolution is a 1x1 without groups and padding, any stride."""
    return weight.shape[2:] == (1, 1) and geometry.padding == (0, 0) and geometry.groups == 1
