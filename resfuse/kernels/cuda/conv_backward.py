"""conv_backward: a 1x1's gradients from recipes (`csrc/cuda/conv_backward.cu`, `csrc/cuda/expand_products.cu`); other
windows and strides by the vendor, between passes of this set's."""

from torch import Tensor

from .. import flat
from ..interface import Act, Addend, BNGrad, Geometry, Grad, Masked, Strided
from ..rounding import rounds_to_tf32
from ..vendor import conv_grads
from ._operands import check_rows, check_views, vector
from ._ops import ops
from .apply import materialised
from .bn_dgrad import bn_dgrad
from .conv_stats import is_product
from .select import select

NO_ADDEND = None, None, None, 1.0


def conv_backward(
    grad: Grad, a: Act, weight: Tensor, geometry: Geometry, add: Addend, needs: tuple[bool, bool],
    mean: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    inside = None if isinstance(add, Strided) or not needs[0] else add
    if is_product(weight, geometry) and geometry.stride == (1, 1):
        da, dweight = _product(grad, a, weight, inside, needs)
    else:
        da, dweight = conv_grads(tensor(grad), materialised(a), weight, geometry, needs)
        if inside is not None:
            da += tensor(inside)
    if da is not None and isinstance(add, Strided):
        down, right = add.stride
        da[:, :, ::down, ::right] += add.compact
    return da, dweight


def _product(
    grad: Grad, a: Act, weight: Tensor, add: Tensor | Masked | None, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    gradient, (x, scale, shift, relu) = flat.gradient(grad), flat.act(a)
    beside = NO_ADDEND if add is None else flat.masked(add)
    check_rows(g=gradient[0], z=gradient[4], add=beside[0])
    check_views(a=x)
    activation = x, vector(scale), vector(shift), relu
    da, dweight = ops().conv_backward(
        *gradient, *activation, weight.flatten(1).contiguous(), *beside, *needs, rounds_to_tf32(x)
    )
    return da if needs[0] else None, dweight.view(weight.shape) if needs[1] else None


def tensor(grad: Grad) -> Tensor:
    """The gradient as a tensor."""
    if isinstance(grad, BNGrad):
        return bn_dgrad(grad)
    return select(grad) if isinstance(grad, Masked) else grad
