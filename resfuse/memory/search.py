"""The exact choice among what parts of a model may keep, each by itself, for the peak of a step or for its time.

Parts run forward in order and backward in reverse, so the peak is the largest, over the parts, of what the parts before
keep and what its own backward holds at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Option(NamedTuple):
    """What a part may be made. saved: bytes kept from its forward on; peak: the most that its backward holds, those
    included; time: what is made again, in bytes moved."""

    memory: str
    every: int
    saved: int
    peak: int
    time: float = 0.0


class Choice(NamedTuple):
    """An option for each part, and what comes of them: bytes kept in all, the most held at once, time."""

    options: tuple[Option, ...]
    saved: int
    peak: int
    time: float


class Impossible(ValueError):
    """No choice has a peak within the limit; least: the least there is."""

    def __init__(self, least: int):
        super().__init__(f"the least possible peak is {least} bytes")
        self.least = least


ABOUT = 1 / 64  # by which the counts themselves are wrong, and more


def leanest(parts: Sequence[Sequence[Option]], more: float = 0.0) -> Choice:
    """Of the choices with about the least peak the fastest that keeps as little as can be, or by a share `more`."""
    choices = _choices(parts)
    enough = (1 + ABOUT) * min(c.peak for c in choices)
    found = [c for c in choices if c.peak <= enough]
    little = (1 + more) * min(c.saved for c in found)
    return min((c for c in found if c.saved <= little), key=lambda c: (c.time, c.saved, c.peak))


def fastest(parts: Sequence[Sequence[Option]], limit: float) -> Choice:
    """The fastest choice whose peak is within the limit; of those that with the least peak. Raises Impossible."""
    choices = _choices(parts)
    found = [c for c in choices if c.peak <= limit]
    if not found:
        raise Impossible(min(c.peak for c in choices))
    return min(found, key=lambda c: (c.time, c.peak, c.saved))


def peak(options: Iterable[Option]) -> int:
    """The most that a step holds at once."""
    saved = most = 0
    for o in options:
        most, saved = max(most, saved + o.peak), saved + o.saved
    return most


def _choices(parts: Sequence[Sequence[Option]]) -> list[Choice]:
    """Those that no other beats in what it keeps, its peak and its time at once: a part's choice bears on later ones by
    these three alone."""
    found = [Choice((), 0, 0, 0.0)]
    for options in parts:
        found = _unbeaten(
            Choice((*c.options, o), c.saved + o.saved, max(c.peak, c.saved + o.peak), c.time + o.time)
            for c in found for o in options
        )  # fmt: skip
    return found


def _unbeaten(choices: Iterable[Choice]) -> list[Choice]:
    kept: list[Choice] = []
    for c in sorted(choices, key=lambda c: (c.time, c.saved, c.peak)):  # who comes later is no faster
        if not any(other.saved <= c.saved and other.peak <= c.peak for other in kept):
            kept.append(c)
    return kept
