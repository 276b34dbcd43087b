"""conv_stats: convolutions with the statistics taken in cache (`csrc/cpu/conv_stats.cpp`, `conv_window.cpp`,
`conv_depthwise.cpp`), other grouped ones by the vendor."""

from torch import Tensor

from ... import _native
from ..interface import Act, Geometry, Norm, Stats, Sum, Want
from ..vendor import conv
from . import _operands
from .apply import apply
from .bn_act import bn_act
from .bn_stats import bn_stats


def conv_stats(a: Act, weight: Tensor, geometry: Geometry, stats: bool) -> tuple[Tensor, Stats | None]:
    if is_depthwise(weight, geometry):
        operands = _operands.any_act(a)
        size = geometry.spatial(operands[0].shape[2:], weight.shape[2:])
        z, mean, var = _native.load().conv_depthwise(*operands, weight, *geometry[:3], *size, stats)
        return z, Stats(mean, var) if stats else None
    a = materialised(a) if isinstance(a, Norm) and a.act is not None else a
    x, scale, shift, relu = _operands.act(a)
    if is_window(weight, geometry):
        height, width = geometry.spatial(x.shape[2:], weight.shape[2:])
        z, mean, var = _native.load().conv_window(
            x, scale, shift, relu, weight, *geometry[:3], height, width, stats
        )
        return z, Stats(mean, var) if stats else None
    if not is_product(weight, geometry):
        z = conv(materialised(a), weight, geometry)
        return z, bn_stats(z) if stats else None
    (rows, columns), matrix = geometry.stride, weight.flatten(1).contiguous()
    z, mean, var = _native.load().conv_stats(x[:, :, ::rows, ::columns], scale, shift, relu, matrix, stats)
    return z, Stats(mean, var) if stats else None


# Fewer fill no vector of columns, or make a product of little depth.
LEAST_CHANNELS = 16
MOST_TAPS = 49  # as csrc/cpu/depthwise.h has it


def is_product(weight: Tensor, geometry: Geometry) -> bool:
    """Whether a convolution is a 1x1 without groups and padding, any stride."""
    return weight.shape[2:] == (1, 1) and geometry.padding == (0, 0) and geometry.groups == 1


def is_window(weight: Tensor, geometry: Geometry) -> bool:
    """Whether a convolution has a window of its own kernels: no groups, channels enough to fill their panels."""
    return not is_product(weight, geometry) and geometry.groups == 1 and min(weight.shape[:2]) >= LEAST_CHANNELS


def is_depthwise(weight: Tensor, geometry: Geometry) -> bool:
    """Whether a convolution is of each channel by itself, of a window that its kernels hold."""
    return geometry.groups == weight.shape[0] > 1 == weight.shape[1] and weight.shape[2:].numel() <= MOST_TAPS


def materialised(a: Act) -> Tensor:
    """The activation as a tensor."""
    if isinstance(a, Norm) and a.act is not None:
        return bn_act(a)
    return apply(a, Sum(relu=a.relu), Want()).out if isinstance(a, Norm) else a
