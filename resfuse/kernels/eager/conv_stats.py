"""conv_stats: the vendor's convolution of the activation, then the statistics of what it wrote."""

from torch import Tensor

from ..interface import Act, Geometry, Stats
from ..vendor import conv
from .bn_stats import bn_stats
from .prepare import prepare


def conv_stats(a: Act, weight: Tensor, geometry: Geometry, stats: bool) -> tuple[Tensor, Stats | None]:
    z = conv(prepare(a), weight, geometry)
    return z, bn_stats(z) if stats else None
