"""finalize: scale = gamma * invstd, shift = beta - mean * scale (`csrc/cuda/finalize.cu`)."""

from torch import Tensor

from ..interface import Affine, Stats
from ._operands import vector
from ._ops import ops


def finalize(stats: Stats, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Affine:
    return Affine(*ops().finalize(*map(vector, stats), vector(gamma), vector(beta), eps))
