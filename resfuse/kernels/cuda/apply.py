"""apply: a sum whose main branch is scale * z + shift, and its mask (`csrc/cuda/apply.cu`)."""

from torch import Tensor

from .. import flat
from ..interface import Act, Norm, Reason, Second, Sum, Unsupported, Want, Written
from . import _operands
from ._ops import ops


def apply(a: Norm, total: Sum, want: Want) -> Written:
    if isinstance(total.residual, Second):
        raise Unsupported([Reason("second", "apply has no kernel for a residual that is a convolution")])
    operands = flat.total(total, want._replace(stats=False))
    _operands.check_views(z=a.z, residual=operands[0])
    _operands.check_rows(gate=total.gate)
    vector = _operands.vector
    residual, scale, shift, *rest = operands
    results = ops().apply(a.z, vector(a.scale), vector(a.shift), residual, vector(scale), vector(shift), *rest)
    return flat.written(results, want._replace(stats=False))


def materialised(a: Act) -> Tensor:
    """The activation as a tensor."""
    if not isinstance(a, Norm):
        return a
    return apply(a, Sum(relu=a.relu), Want()).out if a.y is None else a.y
