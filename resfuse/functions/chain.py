"""Convolutions in a row, each with its BatchNorm, ReLU between them: the main branch of every block.

    a1 = first    z_i = conv_i(a_i)    a_(i+1) = relu(bn_i(z_i))    main = bn_n(conv_n(a_n))

Kept for backward are the raw z's, each BatchNorm and ReLU being recomputed where it is read; the last z only if its
form is `keep`. `docs/math.md` derives each line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.interface import Act, Addend, Grad, Masked, Norm, Second, Stats, Strided
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
            a = k.prepare(main._replace(relu=True))
    return Chain(main, tuple(zs), tuple(kept), tuple(stats))


def activation(k, i: int, first: Act, zs: Sequence[Tensor], kept: Sequence[Kept]) -> Act:
    """The input of unit i, made again."""
    return first if i == 0 else k.prepare(Norm(zs[i - 1], kept[i - 1].scale, kept[i - 1].shift))


def backward(
    k, chain: Sequence[Unit], tensors: Sequence[Tensors], kept: Sequence[Kept], zs: Sequence[Tensor], first: Act,
    g: Grad, y: Act | None, add: Addend, needs_first: bool, needs: Sequence[Tensors],
) -> tuple[Tensor | None, list[Gradients]]:
    """(dfirst + add, gradients of each unit's parameters). g: of the last unit's output; y: that output, activated,
    where g is still to be masked by it, else None."""
    last = len(chain) - 1
    lower = [needs_first]  # whether anything below unit i wants a gradient
    for need in needs[:-1]:
        lower.append(lower[-1] or any(need))
    found = [NONE] * len(chain)
    a, z, masked = activation(k, last, first, zs, kept), zs[last] if chain[last].form == KEEP else None, False
    da, found[last] = units.backward(
        k, chain[last], tensors[last], kept[last], g, a, z, y, last > 0, add if last == 0 else None, lower[last],
        needs[last],
    )
    if chain[last].form == COVARIANCE:
        masked = True
        if last == 0 and needs_first:
            da = gathered(k, a.z if isinstance(a, Norm) else a, da, add)
    del g, y
    for i in reversed(range(last)):
        if not lower[i + 1]:
            break
        y, masked = None if masked else a, False
        a = activation(k, i, first, zs, kept)
        da, found[i] = units.backward(
            k, chain[i], tensors[i], kept[i], da, a, zs[i], y, False, add if i == 0 else None, lower[i], needs[i]
        )
    return (da if needs_first else None), found


def gathered(k, like: Tensor, *addends: Addend) -> Tensor:
    """The sum of gradients of one tensor, as a tensor shaped as it; at least one of them is not None."""
    total = None
    for each in addends:
        if isinstance(each, Strided):
            rows, columns = each.stride
            total = torch.zeros_like(like) if total is None else total.clone()
            total[:, :, ::rows, ::columns] += each.compact
        elif each is not None:
            value = k.select(each) if isinstance(each, Masked) else each
            total = value if total is None else total + value
    return total
