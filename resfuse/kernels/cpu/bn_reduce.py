"""bn_reduce: dbeta = sum(dy), dgamma = invstd * sum(dy * (z - mean)) (`csrc/cpu/bn_reduce.cpp`)."""

from torch import Tensor

from ... import _native
from ..interface import Masked
from . import _operands


def bn_reduce(dy: Tensor | Masked, z: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    _operands.check_rows(z=z)
    return _native.load().bn_reduce(*_operands.masked(dy), z, None, None, mean, invstd, None)[:2]
