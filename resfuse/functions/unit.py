"""One convolution and its BatchNorm inside a block, forward and backward, in its two forms.

    deferred     the raw output z is written; BatchNorm and ReLU are the consumer's prologue. The block keeps a narrow
                 z for backward and recomputes a wide one from the activation that it keeps anyway.
    covariance   a widening 1x1: batch statistics from the covariance of its input, z never written. `docs/math.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.interface import (
    Act,
    Affine,
    BNContext,
    Geometry,
    Grad,
    Norm,
    RunningUpdate,
    Second,
    Stats,
    Strided,
    wide,
)

# Where cov [C, C] is at most this share of one [M, C] activation it is kept, elsewhere recomputed in backward.
KEPT_COVARIANCE_SHARE = 0.02


class Unit(NamedTuple):
    """What is static: geometry, BatchNorm's eps, batch or constant statistics, the form."""

    geometry: Geometry
    eps: float
    batch: bool
    covariance: bool


class Tensors(NamedTuple):
    """The unit's parameters and, for constant statistics, copies of its running buffers; any but weight may be None."""

    weight: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    var: Tensor | None


class Running(NamedTuple):
    """The buffers that a unit's batch statistics update, from `count` values a channel."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None
    count: int


class Kept(NamedTuple):
    """What a unit saves for backward beside its input activation and parameters: C-length vectors, perhaps cov."""

    mean: Tensor
    invstd: Tensor
    scale: Tensor
    shift: Tensor
    input_mean: Tensor | None
    cov: Tensor | None


class Gradients(NamedTuple):
    """Parameter gradients in their parameters' order and dtype."""

    dweight: Tensor | None
    dbias: Tensor | None
    dgamma: Tensor | None
    dbeta: Tensor | None


NONE = Gradients(None, None, None, None)


def sampled(a: Act, stride: tuple[int, int]) -> Act:
    """Every stride-th pixel of an activation, as a view."""
    if stride == (1, 1):
        return a
    sh, sw = stride
    if isinstance(a, Norm):
        return a._replace(z=a.z[:, :, ::sh, ::sw])
    return a[:, :, ::sh, ::sw]


def matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A 1x1 convolution's weight [K, C, 1, 1] as a dense [K, C] in storage dtype."""
    return weight.flatten(1).to(dtype).contiguous()


def forward(kernels, unit: Unit, t: Tensors, a: Act, dtype: torch.dtype) -> tuple[Norm | Second, Stats | None, Kept]:
    """The unit's output as a recipe without activation, its batch statistics (None if constant), what to keep."""
    stats = None if unit.batch else _constant_stats(t, wide(dtype))
    input_mean = cov = z = None
    if unit.covariance:
        a, weight = sampled(a, unit.geometry.stride), matrix(t.weight, dtype)
        if unit.batch:
            input_mean, cov = kernels.covariance(a)
            stats = kernels.expand_stats(weight, input_mean, cov)
    else:
        z, measured = kernels.conv_stats(a, t.weight.to(dtype), unit.geometry, stats=unit.batch)
        stats = measured or stats
    affine = kernels.finalize(stats, t.gamma, t.beta, unit.eps)
    if cov is not None and cov.nbytes > KEPT_COVARIANCE_SHARE * _nbytes(a):
        cov = None
    kept = Kept(stats.mean, affine.invstd, affine.scale, affine.shift, input_mean, cov)
    if unit.covariance:
        recipe = Second(a, weight, affine.scale, affine.shift)
    else:
        recipe = Norm(z, affine.scale, affine.shift, relu=False)
    return recipe, (stats if unit.batch else None), kept


def backward_deferred(
    kernels, unit: Unit, t: Tensors, kept: Kept, dy: Grad, z: Tensor, y: Act | None
) -> tuple[Grad, Tensor, Tensor]:
    """(dz, dgamma, dbeta) from the gradient below the unit's BatchNorm, or below the ReLU that made y."""
    return kernels.bn_backward(dy, y, z, BNContext(kept.mean, kept.invstd, t.gamma, unit.batch))


def backward_covariance(
    kernels, unit: Unit, t: Tensors, kept: Kept, g: Grad, a: Act, relu: bool, needs_input: bool, needs: Tensors
) -> tuple[Tensor | Strided | None, Gradients]:
    """The gradient of the unit's input (masked by its ReLU if `relu`) and of its parameters, z never made.

    a: the input activation, all of it; with a stride the gradient comes as `Strided`. needs: a flag per parameter.
    """
    stride = unit.geometry.stride
    a = sampled(a, stride)
    dtype = a.z.dtype if isinstance(a, Norm) else a.dtype
    weight = matrix(t.weight, dtype)
    affine = Affine(kept.scale, kept.shift, kept.invstd)
    wg = kernels.scale_weight(weight, affine.scale)
    found, u, q, q_scale, c = NONE, None, None, None, None
    if unit.batch or any(needs):
        products, dbeta, u = kernels.expand_products(g, a, kept.input_mean, wg if needs_input else None)
    if unit.batch:
        cov = kernels.covariance(a)[1] if kept.cov is None else kept.cov
        count = _pixels(a)
        dgamma, dweight, q, q_scale, c = kernels.expand_coefficients(
            products, dbeta, weight, wg, kept.input_mean, cov, affine, count
        )
        found = gradients(unit, t, kept, dweight, dgamma, dbeta)
    elif any(needs):
        dgamma = affine.invstd * ((products * weight).sum(1) - dbeta * kept.mean)
        found = gradients(unit, t, kept, affine.scale[:, None] * products, dgamma, dbeta)
    da = kernels.expand_dgrad(g, u, a, wg, q, q_scale, c, relu) if needs_input else None
    if da is not None and stride != (1, 1):
        da = Strided(da, stride)
    return da, found


def running_updates(
    running: Sequence[Running | None], stats: Sequence[Stats | None], tensors: Sequence[Tensors]
) -> list[RunningUpdate]:
    """The pending update of each unit that has buffers; a bias belongs to the mean that BatchNorm saw."""
    updates = []
    for target, measured, t in zip(running, stats, tensors, strict=True):
        if target is not None:
            mean = measured.mean if t.bias is None else measured.mean + t.bias
            buffers = (target.running_mean, target.running_var, target.num_batches_tracked, target.momentum)
            updates.append(RunningUpdate(Stats(mean, measured.var), target.count, *buffers))
    return updates


def gradients(unit: Unit, t: Tensors, kept: Kept, dweight: Tensor | None, dgamma: Tensor, dbeta: Tensor) -> Gradients:
    """Parameter gradients cast and shaped as their parameters. A bias before batch statistics has none."""
    dbias = None
    if t.bias is not None:
        dbias = torch.zeros_like(t.bias) if unit.batch else (kept.scale * dbeta).to(t.bias.dtype)
    return Gradients(
        None if dweight is None else dweight.view(t.weight.shape).to(t.weight.dtype),
        dbias,
        None if t.gamma is None else dgamma.to(t.gamma.dtype),
        None if t.beta is None else dbeta.to(t.beta.dtype),
    )


def _constant_stats(t: Tensors, dtype: torch.dtype) -> Stats:
    """Running statistics of the convolution's output without its bias, which the products leave out."""
    mean = t.mean.to(dtype)
    return Stats(mean if t.bias is None else mean - t.bias, t.var.to(dtype))


def _pixels(a: Act) -> int:
    n, _, h, w = (a.z if isinstance(a, Norm) else a).shape
    return n * h * w


def _nbytes(a: Act) -> int:
    t = a.z if isinstance(a, Norm) else a
    return t.numel() * t.element_size()
