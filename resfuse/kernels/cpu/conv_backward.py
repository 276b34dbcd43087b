"""conv_backward: a 1x1's gradients in one pass (`csrc/cpu/conv_backward.cpp`), other convolutions' by the vendor."""

from torch import Tensor

from ... import _native
from ..interface import Act, Addend, BNGrad, Geometry, Grad, Masked, Strided
from ..vendor import conv_grads
from . import _operands
from .bn_dgrad import bn_dgrad
from .conv_stats import is_product, materialised
from .select import select


def conv_backward(
    grad: Grad, a: Act, weight: Tensor, geometry: Geometry, add: Addend, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    gradient, activation = _operands.gradient(grad), _operands.act(a)
    if is_product(weight, geometry) and geometry.stride == (1, 1):
        inside = None if isinstance(add, Strided) else add
        beside = (None, None, None, 1.0) if inside is None else _operands.masked(inside)
        matrix = weight.flatten(1).contiguous()
        da, dweight = _native.load().conv_backward(*gradient, *activation, matrix, *beside, *needs)
        da, dweight = da if needs[0] else None, dweight.view(weight.shape) if needs[1] else None
    else:
        dz = bn_dgrad(grad) if isinstance(grad, BNGrad) else select(grad) if isinstance(grad, Masked) else grad
        da, dweight = conv_grads(dz, materialised(a), weight, geometry, needs)
        inside = None
    if da is not None and add is not None and inside is None:
        if isinstance(add, Strided):
            rows, columns = add.stride
            da[:, :, ::rows, ::columns] += add.compact
        else:
            da += select(add) if isinstance(add, Masked) else add
    return da, dweight
