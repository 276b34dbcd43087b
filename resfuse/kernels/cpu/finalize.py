"""finalize: scale = gamma * invstd, shift = beta - mean * scale (`csrc/cpu/finalize.cpp`)."""

from torch import Tensor

from ... import _native
from ..interface import Affine, Stats
from ._operands import check_vectors


def finalize(stats: Stats, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Affine:
    gamma, beta = (None if t is None else t.to(stats.mean.dtype) for t in (gamma, beta))
    check_vectors(mean=stats.mean, var=stats.var, gamma=gamma, beta=beta)
    return Affine(*_native.load().finalize(*stats, gamma, beta, eps))
