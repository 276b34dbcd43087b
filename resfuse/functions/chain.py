"""Convolutions in a row, each with its BatchNorm, activations between them: the main branch of every block.

    a1 = first    z_i = conv_i(a_i)    a_(i+1) = act_i(bn_i(z_i))    main = bn_n(conv_n(a_n))

Kept for backward are the raw z's, each BatchNorm and activation being recomputed where it is read; the last z only if
its form is `keep`. `docs/math.md` derives each line. ReLU is part of recipes; another activation makes a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.interface import Act, Addend, Grad, Masked, Norm, Second, Stats, Strided, Summed
from . import unit as units
from .unit import COVARIANCE, KEEP, NONE, Gradients, Kept, Tensors, Unit


class Chain(NamedTuple):
    """What a forward made: the last unit's output as a recipe, the raw outputs to keep, statistics and vectors."""

    main: Norm | Second
    zs: tuple[Tensor, ...]
    kept: tuple[Kept, ...]
    stats: tuple[Stats | None, ...]


def forward(k, chain: Sequence[Unit], tensors: Sequence[Tensors], first: Act, dtype: torch.dtype) -> Chain:
    a, zs, kept, stats = first, [], [], []
    for i, (unit, t) in enumerate(zip(chain, tensors, strict=True)):
        main, measured, vectors = units.forward(k, unit, t, a, dtype)
        kept.append(vectors)
        stats.append(measured)
        if unit.form == KEEP:
            zs.append(main.z)
        if i + 1 < len(chain):
            a = None  # before its successor is made
            a = units.activated(k, unit, vectors, main.z, chain[i + 1])
    return Chain(main, tuple(zs), tuple(kept), tuple(stats))


def activation(k, chain: Sequence[Unit], i: int, first: Act, zs: Sequence[Tensor], kept: Sequence[Kept]) -> Act:
    """The input of unit i, made again."""
    return k.prepare(first) if i == 0 else units.activated(k, chain[i - 1], kept[i - 1], zs[i - 1], chain[i])


def rectified_below(chain: Sequence[Unit], i: int, kept: Sequence[Kept]) -> Kept | None:
    """What the BatchNorm before unit i kept, where ReLU is between them."""
    return kept[i - 1] if i > 0 and chain[i - 1].act is None else None


def wanted_below(needs_first: bool, needs: Sequence[Tensors]) -> list[bool]:
    """For each unit, whether its input's gradient is wanted: by the chain's own input, or by a unit before."""
    lower = [needs_first]
    for need in needs[:-1]:
        lower.append(lower[-1] or any(need))
    return lower


def backward_last(
    k, chain: Sequence[Unit], tensors: Sequence[Tensors], kept: Sequence[Kept], zs: Sequence[Tensor], first: Act,
    g: Grad, y: Act | None, add: Addend, lower: Sequence[bool], needs: Sequence[Tensors],
) -> tuple[Tensor | Summed | None, Act, Gradients]:
    """(gradient of the last unit's input, that input, gradients of its parameters). g: of its output; y: that output,
    activated, where g is still to be masked by it, else None; add: as in `backward_inner`, for a chain of one."""
    last = len(chain) - 1
    a, z = activation(k, chain, last, first, zs, kept), zs[last] if chain[last].form == KEEP else None
    da, found = units.backward(
        k, chain[last], tensors[last], kept[last], g, a, z, y, rectified_below(chain, last, kept),
        add if last == 0 else None, lower[last], needs[last],
    )
    if chain[last].form == COVARIANCE and last == 0 and lower[0]:
        da = gathered(k, a.z if isinstance(a, Norm) else a, da, add)
    return da, a, found


def backward_inner(
    k, chain: Sequence[Unit], tensors: Sequence[Tensors], kept: Sequence[Kept], zs: Sequence[Tensor], first: Act,
    came: list, add: Addend, lower: Sequence[bool], needs: Sequence[Tensors],
) -> tuple[Tensor | None, Act, list[Gradients]]:
    """(dfirst + add, first as it was last made, gradients of each inner unit's parameters).

    came: what `backward_last` gave, da and a, which are taken out of the list so that nobody holds them longer than
    they are read.
    """
    a, da = came.pop(), came.pop()
    masked = (chain[-1].form == COVARIANCE and chain[-2:][0].act is None) or isinstance(da, Summed)
    found = [NONE] * (len(chain) - 1)
    for i in reversed(range(len(found))):
        if not lower[i + 1]:
            break
        unit, t = chain[i], tensors[i]
        onward = lower[i] or needs[i].weight or needs[i].bias
        y = a if unit.act is None else units.activated(k, unit, kept[i], zs[i])
        a = None  # what was read for the last time goes before its successor is made
        dz, dgamma, dbeta = units.backward_norm(k, unit, t, kept[i], da, zs[i], None if masked else y, onward)
        da = y = None
        a, below = activation(k, chain, i, first, zs, kept), rectified_below(chain, i, kept)
        mean = None if below is None else below.mean
        da, dweight = units.backward_conv(k, unit, t, dz, a, add if i == 0 else None, lower[i], needs[i].weight, mean)
        masked = isinstance(da, Summed)
        del dz
        found[i] = units.gradients(unit, t, kept[i], dweight, dgamma, dbeta)
    return (da if lower[0] else None), a, found


def gathered(k, like: Tensor, own: Tensor | Strided, add: Addend) -> Tensor:
    """own + add as a tensor shaped as like. own is nobody else's, and is added to in place."""
    if isinstance(own, Strided):
        rows, columns = own.stride
        total = torch.zeros_like(like)
        total[:, :, ::rows, ::columns] = own.compact
    else:
        total = own
    if isinstance(add, Strided):
        rows, columns = add.stride
        total[:, :, ::rows, ::columns] += add.compact
    elif add is not None:
        total += k.select(add) if isinstance(add, Masked) else add
    return total
