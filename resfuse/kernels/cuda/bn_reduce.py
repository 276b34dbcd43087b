"""bn_reduce: dbeta = sum(dy), dgamma = invstd * sum(dy * (z - mean)) (`csrc/cuda/bn_reduce.cu`)."""

from torch import Tensor

from .. import flat
from ..interface import Masked
from ._operands import check_rows
from ._ops import ops


def bn_reduce(dy: Tensor | Masked, z: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    operands = flat.masked(dy)
    check_rows(dy=operands[0], z=z)
    return ops().bn_reduce(*operands, z, None, None, mean, invstd, None)[:2]
