"""conv_backward: a convolution's gradients from recipes (`csrc/cpu/conv_backward.cpp`, `csrc/cpu/conv_window*.cpp`,
`csrc/cpu/conv_depthwise.cpp`).

Other grouped convolutions are the vendor's.
"""

from torch import Tensor

from ... import _native
from ..interface import Act, Addend, BNGrad, Geometry, Grad, Masked, Norm, Strided
from ..vendor import conv_grads
from . import _operands
from .bn_dgrad import bn_dgrad
from .conv_stats import is_depthwise, is_product, is_window, materialised
from .select import select

NO_ADDEND = (None, None, None, 1.0)


def conv_backward(
    grad: Grad, a: Act, weight: Tensor, geometry: Geometry, add: Addend, needs: tuple[bool, bool],
    mean: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    gradient, depthwise = _operands.gradient(grad), is_depthwise(weight, geometry)
    if isinstance(a, Norm) and a.act is not None and not depthwise:
        a = materialised(a)
    activation = _operands.any_act(a) if depthwise else _operands.act(a)
    stride, padding, dilation, _ = geometry
    inside = None if isinstance(add, Strided) or not needs[0] else add
    beside = NO_ADDEND if inside is None else _operands.masked(inside)
    native, da, dweight, added = _native.load(), None, None, inside is None
    if is_product(weight, geometry) and stride == (1, 1):
        matrix = weight.flatten(1).contiguous()
        da, dweight = native.conv_backward(*gradient, *activation, matrix, *beside, *needs)
        da, dweight = da if needs[0] else None, dweight.view(weight.shape) if needs[1] else None
        added = True
    else:
        height, width = activation[0].shape[2:]
        window = is_window(weight, geometry)
        dgrad, wgrad = native.conv_window_dgrad, native.conv_window_wgrad
        if depthwise:
            dgrad, wgrad = native.conv_depthwise_dgrad, native.conv_depthwise_wgrad
        if needs[0] and (window or depthwise) and is_turned(weight, geometry):
            da = dgrad(*gradient, weight, height, width, stride, padding, dilation, *beside)
            added = True
        if needs[1] and (window or depthwise):
            dweight = wgrad(*gradient, *activation, weight.shape[2:], stride, padding, dilation)
        rest = needs[0] and da is None, needs[1] and dweight is None
        if any(rest):
            theirs = conv_grads(tensor(grad), materialised(a), weight, geometry, rest)
            da, dweight = da if theirs[0] is None else theirs[0], dweight if theirs[1] is None else theirs[1]
    if da is not None and not added:
        da += select(inside) if isinstance(inside, Masked) else inside
    if da is not None and isinstance(add, Strided):
        rows, columns = add.stride
        da[:, :, ::rows, ::columns] += add.compact
    return da, dweight


def is_turned(weight: Tensor, geometry: Geometry) -> bool:
    """Whether the input gradient is a convolution of dz for each place between strides (`csrc/cpu/conv_window.cpp`):
    some tap reaches each, and the padding is less than what the last of them leaves out."""
    sides = zip(weight.shape[2:], geometry.stride, geometry.padding, geometry.dilation, strict=True)
    for taps, step, pad, spread in sides:
        for first in range(step):
            reach = [first + pad - r * spread for r in range(taps) if (first + pad - r * spread) % step == 0]
            if not reach or min(reach) > 0:
                return False
    return True


def tensor(grad: Grad) -> Tensor:
    """The gradient as a tensor."""
    if isinstance(grad, BNGrad):
        return bn_dgrad(grad)
    return select(grad) if isinstance(grad, Masked) else grad
