"""Floating-point operations of the blocks' products, for torch.utils.flop_counter: two for each multiply-add, as there;
what is no product counts as none.

    keep         z = a * W                                 da = dz * W, dW = dz * a
    recompute    the same, and z once more in backward
    covariance   z, cov = a * a, W * cov                   P = g * a, da = g * W + a * Q, W * cov, Q; cov where not kept

Formulas are given what the operators of `ops.py` are, shapes for tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from math import prod
from typing import NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from . import ops
from .branches import PROJECTION, Inputs, Spec
from .unit import COVARIANCE, RECOMPUTE, Tensors, Unit


class Product(NamedTuple):
    """A unit's convolution. rows: pixels of its output; into: whether its input's gradient is wanted; needs: which
    gradients of its parameters are."""

    unit: Unit
    weight: Sequence[int]
    rows: int
    into: bool
    needs: Tensors | None

    @property
    def whole(self) -> int:
        return 2 * self.rows * prod(self.weight)

    @property
    def square(self) -> tuple[int, int]:
        """cov, and a product of the weight with a matrix of its size."""
        outer, inner = self.weight[:2]
        return 2 * self.rows * inner**2, 2 * outer * inner**2


def products(spec: Spec, shapes: Sequence, needs: Sequence[bool] | None) -> Iterator[Product]:
    """Each convolution of a block. needs: of backward, None in forward."""
    inputs = Inputs.arrange(spec, shapes)
    wanted = None if needs is None else Inputs.arrange(spec, needs)
    size = (inputs.parts[0][0], sum(part[1] for part in inputs.parts), *inputs.parts[0][2:])
    first, out = size, size
    below = wanted is not None and any((*wanted.parts, *(need for norm in wanted.norm for need in norm)))
    into = below
    for i, (unit, t) in enumerate(zip(spec.units, inputs.units, strict=True)):
        out = (size[0], t.weight[0], *unit.geometry.spatial(out[2:], t.weight[2:]))
        need = None if wanted is None else wanted.units[i]
        yield Product(unit, t.weight, _pixels(out), into, need)
        into = into or (need is not None and any(need))
    if spec.shortcut.kind == PROJECTION:
        unit, window, t = spec.shortcut.unit, spec.shortcut.window, inputs.shortcut[0]
        source = first[2:] if window is None else window.spatial(first[2:])
        beside = (size[0], t.weight[0], *unit.geometry.spatial(source, t.weight[2:]))
        yield Product(unit, t.weight, _pixels(beside), below, wanted and wanted.shortcut[0])


def block(operands, spec, *, out_shape=None) -> int:
    total = 0
    for product in products(ops.decode(spec), operands, None):
        total += product.whole
        if product.unit.form == COVARIANCE and product.unit.batch:
            total += sum(product.square)
    return total


def block_backward(operands, saved, dout, spec, needs, *, out_shape=None) -> int:
    total, saved = 0, [list(shape) for shape in saved if shape is not None]
    for product in products(ops.decode(spec), operands, needs):
        if not (product.into or any(product.needs)):
            continue
        covariance = product.unit.form == COVARIANCE
        weight = product.needs.weight or (covariance and (product.unit.batch or any(product.needs)))
        total += product.whole * (product.into + weight + (product.unit.form == RECOMPUTE))
        if covariance and product.unit.batch:
            rows, square = product.square
            again = [product.weight[1]] * 2 not in saved
            total += 2 * square + rows * (product.into + again)
    return total


@cache
def register() -> None:
    """Tell torch's flop counter. A counter takes the formulas that there are when it is made."""
    for formula in (block, block_backward):
        register_flop_formula(getattr(torch.ops.resfuse, formula.__name__))(formula)


def _pixels(shape: Sequence[int]) -> int:
    return shape[0] * prod(shape[2:])
