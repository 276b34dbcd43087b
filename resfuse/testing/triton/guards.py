"""Buffers between margins of NaN (or of a pattern), which must be there after a kernel has run.

A kernel that reads a margin spreads NaN; one that writes to it is found out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

MARGIN = 1 << 12  # values before and behind a buffer
PATTERN = 0x55


@contextmanager
def guarded(args: tuple, device: str, name: str) -> Iterator[tuple]:
    """Inside, args with every tensor, in tuples too, replaced by a copy on the device; what a kernel did to the copies
    is done to the tensors afterwards. Raises AssertionError if a margin has changed."""
    guards: dict[int, _Guard] = {}
    yield _replaced(args, guards, device)
    for guard in guards.values():
        guard.give_back(name)


class _Guard:
    """A copy of a tensor's memory between two margins."""

    def __init__(self, t: Tensor, device: str):
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        span = last + 1 if t.numel() else 0
        self.source = t.as_strided((span,), (1,))
        self.buffer = torch.empty(span + 2 * MARGIN, dtype=t.dtype, device=device)
        if t.is_floating_point():
            self.buffer.fill_(float("nan"))
        else:
            self.buffer.view(torch.uint8).fill_(PATTERN)
        self.inside = self.buffer[MARGIN : MARGIN + span]
        self.margins = self._margins()
        self.inside.copy_(self.source)
        self.tensor = self.buffer.as_strided(t.shape, t.stride(), MARGIN)

    def _margins(self) -> Tensor:
        return torch.cat([self.buffer[:MARGIN], self.buffer[-MARGIN:]]).view(torch.uint8)

    def give_back(self, name: str) -> None:
        if not torch.equal(self._margins(), self.margins):
            raise AssertionError(f"{name} wrote outside of a buffer {tuple(self.tensor.shape)} of {self.tensor.dtype}")
        result = self.inside.to(self.source.device)
        if not torch.equal(result.view(torch.uint8), self.source.view(torch.uint8)):  # an operand stays unwritten
            self.source.copy_(result)


def _replaced(value, guards: dict[int, _Guard], device: str):
    """value with every tensor guarded, the same one once."""
    if isinstance(value, Tensor):
        if id(value) not in guards:
            guards[id(value)] = _Guard(value, device)
        return guards[id(value)].tensor
    if isinstance(value, tuple):
        parts = [_replaced(part, guards, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
