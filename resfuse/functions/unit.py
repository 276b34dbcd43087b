"""One convolution and its BatchNorm inside a block, forward and backward, in its forms.

    keep         the raw output z is written and kept for backward; BatchNorm and ReLU are the consumer's prologue
    recompute    as `keep`, but z is wide and cheap: dropped, and made again from the activation that is kept anyway
    covariance   a 1x1 whose z is never written. Batch statistics come from the covariance of its input
                 (`docs/math.md`), constant ones need none.
    linear       no BatchNorm at all, so that backward needs no z
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.interface import (
    Act,
    Activation,
    Addend,
    Affine,
    BNContext,
    Geometry,
    Grad,
    Masked,
    Norm,
    RunningUpdate,
    Second,
    Stats,
    Strided,
    Summed,
    wide,
)
from . import sync

KEEP, RECOMPUTE, COVARIANCE, LINEAR = "keep", "recompute", "covariance", "linear"
# Where one [M, C] activation is at least so many times as large as cov [C, C], that is kept, elsewhere recomputed in
# backward.
KEPT_COVARIANCE_RATIO = 50


class Unit(NamedTuple):
    """What is static: geometry (None: a BatchNorm alone), eps (None: no BatchNorm), whether its statistics are
    the batch's or constants, the form, the processes whose batches are one (None: this one alone), and what follows in
    the chain, None for ReLU."""

    geometry: Geometry | None
    eps: float | None
    batch: bool
    form: str
    group: dist.ProcessGroup | None = None
    act: Activation | None = None


class Tensors(NamedTuple):
    """The unit's parameters and, for constant statistics, copies of its running buffers; any may be None, weight where
    there is no convolution."""

    weight: Tensor | None
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
    """What a unit saves for backward beside its input activation and parameters: C-length vectors, perhaps cov, and of
    statistics shared by processes the number of values."""

    mean: Tensor
    invstd: Tensor
    scale: Tensor
    shift: Tensor
    input_mean: Tensor | None = None
    cov: Tensor | None = None
    count: Tensor | None = None


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
        return a._replace(z=a.z[:, :, ::sh, ::sw], y=None)
    return a[:, :, ::sh, ::sw]


def is_pointwise(unit: Unit, t: Tensors) -> bool:
    """Whether it is a 1x1 that reads every stride-th pixel and no others."""
    return t.weight.shape[2:] == (1, 1) and unit.geometry.padding == (0, 0)


def matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A 1x1 convolution's weight [K, C, 1, 1] as a dense [K, C] in storage dtype."""
    return weight.flatten(1).to(dtype).contiguous()


def forward(kernels, unit: Unit, t: Tensors, a: Act, dtype: torch.dtype) -> tuple[Norm | Second, Stats | None, Kept]:
    """The unit's output as a recipe without activation, its batch statistics (None if constant) as running ones want
    them, what to keep."""
    measured = input_mean = cov = z = None
    if unit.form == COVARIANCE:
        a = kernels.prepare(sampled(a, unit.geometry.stride), t.weight.shape[0])
        if unit.batch:
            input_mean, cov = kernels.covariance(a)
            measured = kernels.expand_stats(matrix(t.weight, dtype), input_mean, cov)
    else:
        z, measured = kernels.conv_stats(a, t.weight.to(dtype), unit.geometry, stats=unit.batch)
    kept, measured = normalise(kernels, unit, t, measured, 0 if z is None else _pixels(z), wide(dtype))
    if cov is not None and not keeps_covariance(_tensor(a).shape, dtype):
        cov = None
    kept = kept._replace(input_mean=input_mean, cov=cov)
    return recipe(unit, t, kept, a, z), measured, kept


def normalise(
    kernels, unit: Unit, t: Tensors, measured: Stats | None, pixels: int, exact: torch.dtype
) -> tuple[Kept, Stats | None]:
    """BatchNorm's affine map from measured statistics, of `pixels` values a channel, or from the constant ones; and
    what running statistics move towards."""
    count, running = None, measured
    if unit.group is not None:
        measured, running, count = sync.gather(measured, pixels, unit.eps, unit.group)
    stats = measured or _constant_stats(t, exact)
    affine = kernels.finalize(stats, t.gamma, t.beta, unit.eps or 0.0)
    return Kept(stats.mean, affine.invstd, affine.scale, affine.shift, count=count), running


def recipe(unit: Unit, t: Tensors, kept: Kept, a: Act, z: Tensor | None) -> Norm | Second:
    """The unit's output, without activation, from z or, in covariance form, from the sampled input activation."""
    if unit.form == COVARIANCE:
        return Second(a, matrix(t.weight, dtype_of(a)), kept.scale, kept.shift)
    return Norm(z, kept.scale, kept.shift, relu=False)


def again(kernels, unit: Unit, t: Tensors, kept: Kept, a: Act | None, z: Tensor | None) -> Norm | Second:
    """`forward`'s recipe, in backward: of z where that was kept, else of the input activation."""
    if unit.form == COVARIANCE:
        a = kernels.prepare(sampled(a, unit.geometry.stride), t.weight.shape[0])
    elif z is None:
        z = raw(kernels, unit, t, a)
    return recipe(unit, t, kept, a, z)


def raw(kernels, unit: Unit, t: Tensors, a: Act) -> Tensor:
    """z, made again."""
    return kernels.conv_stats(a, t.weight.to(dtype_of(a)), unit.geometry, stats=False)[0]


def backward(
    kernels, unit: Unit, t: Tensors, kept: Kept, g: Grad, a: Act, z: Tensor | None, y: Act | None, below: Kept | None,
    add: Addend, needs_input: bool, needs: Tensors,
) -> tuple[Tensor | Summed | Strided | None, Gradients]:
    """The gradient of the unit's input and of its parameters, in any form.

    z: its kept output (form `keep`); y: its activated output where g still is to be masked by that, else None; below:
    what the BatchNorm and ReLU that made the input kept, if there were any: the ReLU masks the gradient in covariance
    form, where that is free, and elsewhere if it comes as `Summed`. add: another path's gradient of the same input,
    which is left to the caller in covariance form.
    """
    if not (needs_input or any(needs)):
        return None, NONE
    if unit.form == COVARIANCE:
        return backward_covariance(kernels, unit, t, kept, g, a, below, needs_input, needs)
    mean = None if below is None else below.mean
    if unit.form == LINEAR:
        dz = kernels.prepare(g)
        dweight, dbias = None, None
        if t.bias is not None and needs.bias:
            dz = kernels.select(dz) if isinstance(dz, Masked) else dz
            dbias = dz.sum((0, 2, 3), dtype=wide(dz.dtype)).to(t.bias.dtype)
        da, dweight = backward_conv(kernels, unit, t, dz, a, add, needs_input, needs.weight, mean)
        dweight = None if dweight is None else _like(_as_parameter(dweight, t.weight), t.weight)
        return da, Gradients(dweight, dbias, None, None)
    if unit.form == RECOMPUTE:
        z = raw(kernels, unit, t, a)
    dz, dgamma, dbeta = backward_norm(kernels, unit, t, kept, g, z, y, needs_input or needs.weight or needs.bias)
    da, dweight = backward_conv(kernels, unit, t, dz, a, add, needs_input, needs.weight, mean)
    return da, gradients(unit, t, kept, dweight, dgamma, dbeta)


def backward_conv(
    kernels, unit: Unit, t: Tensors, dz: Grad, a: Act, add: Addend, needs_input: bool, needs_weight: bool,
    mean: Tensor | None = None,
) -> tuple[Tensor | Summed | None, Tensor | None]:
    """(da + add, dweight) of the unit's convolution; mean: of the BatchNorm that made a."""
    weight = t.weight.to(dtype_of(a))
    needs = needs_input, needs_weight
    return kernels.conv_backward(dz, a, weight, unit.geometry, add if needs_input else None, needs, mean)


def backward_norm(
    kernels, unit: Unit, t: Tensors, kept: Kept, dy: Grad | Summed, z: Tensor, y: Act | None, onward: bool
) -> tuple[Grad, Tensor, Tensor]:
    """(dz, dgamma, dbeta) from the gradient below the unit's BatchNorm, or of y, its activated output (a recipe, where
    it is not rectified). onward: whether anybody wants dz; processes exchange sums for it alone."""
    context = BNContext(kept.mean, kept.invstd, t.gamma, own_batch(unit))
    if unit.act is None or y is None:
        dz, dgamma, dbeta = kernels.bn_backward(dy, y, z, context)
    else:
        dy = kernels.select(dy) if isinstance(dy, Masked) else dy
        dz, dgamma, dbeta = kernels.bn_act_backward(dy, y, context)
    if unit.group is not None and onward:
        sums = sync.gradient_sums(dgamma, dbeta, kept.invstd, kept.count, unit.group)
        dz = sync.completed(kernels, dz, z, kept.mean, kept.scale, *sums)
    return dz, dgamma, dbeta


def activated(kernels, unit: Unit, kept: Kept, z: Tensor, reader: Unit | None = None) -> Act:
    """What follows the unit, made from its output: for the next one, or, without a reader, for `backward_norm`. Few
    read a recipe of another activation than ReLU."""
    recipe = Norm(z, kept.scale, kept.shift, act=unit.act)
    if unit.act is None:
        return kernels.prepare(recipe)
    depthwise = reader is not None and reader.geometry.groups == z.shape[1] > 1
    return recipe if reader is None or (depthwise and kernels.any_activation) else kernels.bn_act(recipe)


def own_batch(unit: Unit) -> bool:
    """Whether the statistics are those of this process's batch alone."""
    return unit.batch and unit.group is None


def backward_covariance(
    kernels, unit: Unit, t: Tensors, kept: Kept, g: Grad, a: Act, below: Kept | None, needs_input: bool, needs: Tensors
) -> tuple[Tensor | Summed | Strided | None, Gradients]:
    """The gradient of the unit's input (masked by its ReLU, if it has one) and of its parameters, z never made.

    a: the input activation, all of it; with a stride the gradient comes as `Strided`. needs: a flag per parameter.
    """
    stride = unit.geometry.stride
    a = kernels.prepare(sampled(a, stride), t.weight.shape[0])
    weight = matrix(t.weight, dtype_of(a))
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
    da = None
    if needs_input:
        mean = None if below is None or stride != (1, 1) else below.mean
        da = kernels.expand_dgrad(g, u, a, wg, q, q_scale, c, below is not None, mean)
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
    if dweight is not None:
        dweight = _like(_as_parameter(dweight, t.weight), t.weight)
    dgamma = None if t.gamma is None else _as_parameter(dgamma, t.gamma)
    return Gradients(dweight, dbias, dgamma, None if t.beta is None else _as_parameter(dbeta, t.beta))


def _like(gradient: Tensor, weight: Tensor) -> Tensor:
    """A 1x1's gradient in its weight's shape, with its strides even where they do not matter: DDP compares them."""
    if weight.shape[2:] != (1, 1):
        return gradient
    if gradient.stride()[:2] == weight.stride()[:2]:
        return gradient.as_strided(weight.shape, weight.stride())
    return gradient.view(weight.shape)


def _as_parameter(gradient: Tensor, parameter: Tensor) -> Tensor:
    return gradient if gradient.dtype == parameter.dtype else gradient.to(parameter.dtype)


def dtype_of(a: Act) -> torch.dtype:
    """The storage dtype of an activation."""
    return _tensor(a).dtype


def _constant_stats(t: Tensors, dtype: torch.dtype) -> Stats:
    """Running statistics of the convolution's output without its bias, which the products leave out."""
    mean = t.mean.to(dtype)
    return Stats(mean if t.bias is None else mean - t.bias, t.var.to(dtype))


def keeps_covariance(size: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether the covariance of activations [N, C, H, W] is small beside them, and kept."""
    n, channels, h, w = size
    return KEPT_COVARIANCE_RATIO * channels * wide(dtype).itemsize <= n * h * w * dtype.itemsize


def _tensor(a: Act) -> Tensor:
    return a.z if isinstance(a, Norm) else a


def _pixels(a: Act) -> int:
    n, _, h, w = _tensor(a).shape
    return n * h * w
