"""select: scale * row_scale[n] * (dout where mask else 0) as a tensor (`csrc/cuda/bn_dgrad.cu`)."""

from torch import Tensor

from .. import flat
from ..interface import Masked
from ._operands import check_rows
from ._ops import ops


def select(grad: Masked) -> Tensor:
    check_rows(g=grad.dout)
    return ops().bn_dgrad(*flat.gradient(grad))
