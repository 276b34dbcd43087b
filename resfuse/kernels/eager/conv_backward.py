"""conv_backward: the vendor's input and weight gradients, then the shortcut's gradient added."""

from torch import Tensor

from ..interface import Act, Addend, Geometry, Grad, Strided
from ..vendor import conv_grads
from .prepare import prepare


def conv_backward(
    grad: Grad, a: Act, weight: Tensor, geometry: Geometry, add: Addend, needs: tuple[bool, bool],
    mean: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    da, dweight = conv_grads(prepare(grad), prepare(a), weight, geometry, needs)
    if da is not None and add is not None:
        if isinstance(add, Strided):
            (sh, sw) = add.stride
            da[:, :, ::sh, ::sw] += add.compact
        else:
            da += prepare(add)
    return da, dweight
