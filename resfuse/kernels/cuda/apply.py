"""apply: a sum whose main branch is scale * z + shift, and its mask (`csrc/cuda/apply.cu`)."""

import torch
from torch import Tensor

from .. import flat
from ..interface import Act, Norm, Second, Sum, Want, Written
from ..rounding import rounds_to_tf32
from . import _operands
from ._ops import ops
from .bn_act import bn_act
from .expand import expand


def apply(a: Norm, total: Sum, want: Want) -> Written:
    if isinstance(total.residual, Second):
        return _beside_a_product(a, total.residual, total, want)
    operands = flat.total(total, want._replace(stats=False))
    _operands.check_views(z=a.z, residual=operands[0])
    _operands.check_rows(gate=total.gate)
    vector = _operands.vector
    residual, scale, shift, *rest = operands
    results = ops().apply(a.z, vector(a.scale), vector(a.shift), residual, vector(scale), vector(shift), *rest)
    return flat.written(results, want._replace(stats=False))


def _beside_a_product(a: Norm, second: Second, total: Sum, want: Want) -> Written:
    """Where nothing tells the two branches apart, the product's is the main one and is never stored."""
    if total.row_scale is None and total.gate is None:
        linear = Norm(a.z, a.scale, a.shift, False)
        return expand(second.x, second.weight, second.scale, second.shift, total._replace(residual=linear), want)
    x, scale, shift, relu = flat.act(second.x)
    _operands.check_views(second=x)
    recipe = x, _operands.vector(scale), _operands.vector(shift), relu
    z = ops().conv_stats(*recipe, second.weight.contiguous(), False, rounds_to_tf32(x))[0]
    return apply(a, total._replace(residual=Norm(z, second.scale, second.shift, False)), want)


def materialised(a: Act) -> Tensor:
    """The activation as a tensor."""
    if not isinstance(a, Norm):
        return a
    if a.act is not None:
        return bn_act(a._replace(z=a.z.contiguous(memory_format=torch.channels_last)))
    return apply(a, Sum(relu=a.relu), Want()).out if a.y is None else a.y
