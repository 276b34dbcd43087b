"""Device functions of the activations other than ReLU, as torch has them, of float32 values.

KIND is the name in `interface.ACTIVATIONS`; slope is leaky_relu's, a number at run time: no kernel is compiled anew for
it. Beyond float32's range exp(-v) is inf, v / inf is the 0 that is meant, and -inf / inf torch's NaN.
"""

import triton
import triton.language as tl

from ._tiles import rectify


@triton.jit
def _relu6(v):
    return tl.minimum(rectify(v), 6.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def act_value(v, slope, KIND: tl.constexpr):
    """The activation of v."""
    if KIND == "leaky_relu":
        return tl.where(v > 0, v, v * slope)
    elif KIND == "relu6":
        return _relu6(v)
    elif KIND == "silu":
        return v / (1.0 + tl.exp(-v))
    else:
        tl.static_assert(KIND == "hardswish")
        return (v * (1.0 / 6.0)) * _relu6(v + 3.0)  # in this order a large v does not overflow


@triton.jit
def act_gradient(dy, v, slope, KIND: tl.constexpr):
    """dy * act'(v), at bends as torch's, at NaN as its vectorised CPU kernels (others differ from them there). Where
    a comparison says that the derivative is 0, the result is 0 whatever dy is."""
    if KIND == "leaky_relu":
        return dy * tl.where(v > 0, 1.0, slope)
    elif KIND == "relu6":
        return tl.where((v > 0) & (v < 6), dy, 0.0)
    elif KIND == "silu":
        s = 1.0 / (1.0 + tl.exp(-v))
        return dy * s * (1.0 + v * (1.0 - s))
    else:
        tl.static_assert(KIND == "hardswish")
        return tl.where(v <= -3, 0.0, dy * tl.where(v >= 3, 1.0, v * (1.0 / 3.0) + 0.5))
