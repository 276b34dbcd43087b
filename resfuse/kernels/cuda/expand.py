"""expand: a sum whose main branch is scale * (a @ W.T) + shift, the product never stored (`csrc/cuda/expand.cu`)."""

from torch import Tensor

from .. import flat
from ..interface import Act, Second, Sum, Want, Written
from ..rounding import rounds_to_tf32
from ._operands import check_rows, check_views, vector
from ._ops import ops


def expand(a: Act, weight: Tensor, scale: Tensor, shift: Tensor, total: Sum, want: Want) -> Written:
    x, x_scale, x_shift, x_relu = flat.act(a)
    beside, second, second_weight = total.residual, (None, None, None, False), None
    if isinstance(beside, Second):
        second, second_weight = flat.act(beside.x), beside.weight.contiguous()
    residual, residual_scale, residual_shift, *rest = flat.total(total, want)
    check_views(a=x, second=second[0], residual=residual)
    check_rows(gate=total.gate)
    results = ops().expand(
        x, vector(x_scale), vector(x_shift), x_relu, weight.contiguous(), vector(scale), vector(shift),
        second[0], vector(second[1]), vector(second[2]), second[3], second_weight,
        residual, vector(residual_scale), vector(residual_shift), *rest, rounds_to_tf32(x),
    )  # fmt: skip
    return flat.written(results, want)
