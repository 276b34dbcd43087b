"""conv_stats: 1x1 convolutions with the statistics taken in cache (`csrc/cpu/conv_stats.cpp`), others by the vendor."""

from torch import Tensor

from ... import _native
from ..interface import Act, Geometry, Norm, Stats, Sum, Want
from ..vendor import conv
from . import _operands
from .apply import apply
from .bn_stats import bn_stats


def conv_stats(a: Act, weight: Tensor, geometry: Geometry, stats: bool) -> tuple[Tensor, Stats | None]:
    x, scale, shift, relu = _operands.act(a)
    if not is_product(weight, geometry):
        z = conv(materialised(a), weight, geometry)
        return z, bn_stats(z) if stats else None
    (rows, columns), matrix = geometry.stride, weight.flatten(1).contiguous()
    z, mean, var = _native.load().conv_stats(x[:, :, ::rows, ::columns], scale, shift, relu, matrix, stats)
    return z, Stats(mean, var) if stats else None


def is_product(weight: Tensor, geometry: Geometry) -> bool:
    """Whether a convolution is a 1x1 without groups and padding, any stride."""
    return weight.shape[2:] == (1, 1) and geometry.padding == (0, 0) and geometry.groups == 1


def materialised(a: Act) -> Tensor:
    """The activation as a tensor."""
    return apply(a, Sum(relu=a.relu), Want()).out if isinstance(a, Norm) else a
