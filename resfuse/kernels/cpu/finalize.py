"""finalize: scale = gamma * invstd, shift = beta - mean * scale (`csrc/cpu/finalize.cpp`)."""

from torch import Tensor

from ... import _native
from .. import flat
from ..interface import Affine, Stats
from ._operands import check_vectors


def finalize(stats: Stats, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Affine:
    gamma, beta = flat.vector(gamma), flat.vector(beta)
    check_vectors(mean=stats.mean, var=stats.var, gamma=gamma, beta=beta)
    return Affine(*_native.load().finalize(*stats, gamma, beta, eps))
