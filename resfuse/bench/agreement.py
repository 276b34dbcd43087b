"""Whether a fused model computes what the model computes: output, gradients and buffers, in float64."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import convert
from ..blocks.mixin import FusedMixin

TOLERANCE = 1e-7  # of relative differences in float64
SEED = 1  # what is drawn in a forward, both draw


@dataclass(frozen=True)
class Agreement:
    """Relative differences, the largest of any tensor; fallbacks: codes of calls that ran the original forward.

    moved: where the evaluations are apart, how far the model's own are for an input whose values are each the next
    number, 2e-16 more. With drawn weights and their running statistics a deep network may make anything of that.
    """

    evaluation: float
    output: float
    gradients: float
    buffers: float
    fallbacks: list[str]
    moved: float = 0.0

    @property
    def trained(self) -> float:
        return max(self.output, self.gradients, self.buffers)

    @property
    def agrees(self) -> bool:
        evaluated = self.evaluation < max(TOLERANCE, 10 * self.moved)
        return evaluated and self.trained < TOLERANCE and not self.fallbacks


def agreement(model: nn.Module, size: tuple[int, ...], *others) -> Agreement:
    """Of the model, which is changed, on random images of that size: an evaluation, then a training step. others: what
    its forward takes besides."""
    torch.manual_seed(0)
    twin, x = copy.deepcopy(model.double()), torch.randn(size, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert.fuse(twin)
    with torch.no_grad():
        theirs, ours = (_tensors(_seeded(each.eval(), x, *others)) for each in (model, twin))
        evaluation, moved = _difference(theirs, ours), 0.0
        if evaluation >= TOLERANCE:
            next_to_x = x.nextafter(torch.full_like(x, torch.inf))
            moved = _difference(theirs, _tensors(_seeded(model, next_to_x, *others)))
    theirs, ours = (_tensors(_seeded(each.train(), x, *others)) for each in (model, twin))
    for found in (theirs, ours):
        sum(t.sin().sum() for t in found).backward()
    fallbacks = {c for m in twin.modules() if isinstance(m, FusedMixin) for c in m.resfuse_state.fallbacks}
    return Agreement(
        evaluation,
        _difference(theirs, ours),
        _difference([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()]),
        _difference(list(model.buffers()), list(twin.buffers())),
        sorted(fallbacks),
        moved,
    )


def _seeded(model: nn.Module, *inputs):
    torch.manual_seed(SEED)
    return model(*inputs)


def _tensors(found) -> list[Tensor]:
    """Those of an output of whatever structure, that have a gradient or would."""
    if isinstance(found, Tensor):
        return [found] if found.is_floating_point() else []
    values = found.values() if isinstance(found, dict) else found
    return [t for value in values if value is not None for t in _tensors(value)]


def _difference(theirs: list[Tensor | None], ours: list[Tensor | None]) -> float:
    """The largest norm of a difference by the norm, or by a thousandth of the largest norm: a bias before a BatchNorm
    has a gradient of rounding errors. inf where one side has none."""
    assert len(theirs) == len(ours)
    if any((a is None) != (b is None) for a, b in zip(theirs, ours, strict=True)):
        return float("inf")
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(theirs, ours, strict=True) if a is not None]
    least = 1e-3 * max((a.norm().item() for a, _ in pairs), default=0.0)
    return max(((a - b).norm().item() / max(a.norm().item(), least, 1e-12) for a, b in pairs), default=0.0)
