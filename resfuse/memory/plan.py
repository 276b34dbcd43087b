"""From a model, its rows of blocks and what is asked for, to how lean each of them is made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import NamedTuple

from torch import Tensor, nn

from . import count, search
from .count import Held, Step
from .search import Option


class Row(NamedTuple):
    """An nn.Sequential and its children: each one's name, module and plan, None for what is no block of a run."""

    fqn: str
    children: tuple[tuple[str, nn.Module, ModuleType | None], ...]


class Stem(NamedTuple):
    """A stem, the names of its first and last module, and its convolution's weight."""

    fqn: str
    first: str
    last: str
    weight: Tensor


class Plan(NamedTuple):
    """options: of each row and stem by its name; share: the peak of a step as a share of eager's, both as counted, None
    where that cannot be."""

    options: dict[str, Option]
    share: float | None


def make(
    model: nn.Module, rows: Sequence[Row], stems: Sequence[Stem], memory: str | float, input_size: Sequence[int]
) -> Plan:
    """memory: as in `FuseConfig`. Raises `count.Uncounted`, and ValueError where a share is less than can be."""
    marked = {stem.fqn: (stem.first, stem.last) for stem in stems}
    marked |= {name: (name, name) for row in rows for name, _, _ in row.children}
    steps, called = count.steps(model, marked, [row.fqn for row in rows], input_size)
    runs = [row for row in rows if row.fqn in called]  # a model may iterate over others, and call each block itself
    eager = search.peak(Option("eager", 1, step.kept, step.peak) for step in steps)
    with count.trained(model):
        names, parts = _parts(steps, runs, stems, memory)
    try:
        if isinstance(memory, float):
            choice = search.fastest(parts, memory * eager)
        else:
            choice = search.leanest(parts, MORE if memory == "leanest" else 0.0)
    except search.Impossible as found:
        raise ValueError(
            f"memory={memory}: the least possible peak of a step is {found.least / eager:.3f} of eager's, blocks in no "
            f"row counted as eager's (input {'x'.join(map(str, input_size))})"
        ) from None
    options = {} if isinstance(memory, float) else uncounted(rows, stems, memory).options  # of what did not run
    options |= {name: option for name, option in zip(names, choice.options, strict=True) if name is not None}
    return Plan(options, choice.peak / eager)


MORE = 0.1  # of what leanest keeps, for time: the peak, which decides what fits, is as it was
SHORT = 8  # blocks in a row: what backward makes again of so many is small beside what it has freed by then


def uncounted(rows: Sequence[Row], stems: Sequence[Stem], memory: str) -> Plan:
    """Without sizes: of a long row of n blocks an output is kept after every k, for the least of n/k + k."""
    options = {stem.fqn: Option("leanest", 1, 0, 0) for stem in stems if memory == "leanest"}
    for row in rows:
        n = len(row.children)
        every = n if n <= SHORT else min(range(1, n + 1), key=lambda k: (-(-n // k) + k, -k))
        options[row.fqn] = Option(memory, every, 0, 0)
    return Plan(options, None)


def _parts(
    steps: Sequence[Step], rows: Sequence[Row], stems: Sequence[Stem], memory: str | float
) -> tuple[list[str | None], list[list[Option]]]:
    """The parts of a forward in order, by name: rows and stems with their options, others with the one they have."""
    of_row, of_stem = {name: row for row in rows for name, _, _ in row.children}, {stem.fqn: stem for stem in stems}
    named, found = {step.name: step for step in steps}, {}
    for i, step in enumerate(steps):
        if step.name in of_row:
            row = of_row[step.name]
            found[row.fqn] = lambda row=row: _row_options(row, named, memory)
        elif step.name in of_stem:
            found[step.name] = lambda step=step: _stem_options(step, of_stem[step.name], memory)
        else:
            found[i] = lambda step=step: [Option("eager", 1, step.kept, step.peak)]
    return [name if isinstance(name, str) else None for name in found], [options() for options in found.values()]


def _stem_options(step: Step, stem: Stem, memory: str | float) -> list[Option]:
    kept, work = step.x + step.out // step.itemsize, step.out + 2 * step.convolved  # a byte for each place
    macs = stem.weight[0].numel() * step.convolved // step.itemsize
    time = macs * count.mac_bytes(stem.weight) + step.x + step.convolved
    options = [
        Option("balanced", 1, kept + step.convolved, kept + step.convolved + work),
        Option("leanest", 1, kept, kept + step.convolved + work, time),
    ]
    return options if isinstance(memory, float) else [options[memory == "leanest"]]


def _row_options(row: Row, steps: dict[str, Step], memory: str | float) -> list[Option]:
    """One for each number of pieces that the row may be in, of each kind that may be."""
    blocks = [
        plan and count.held(module, plan, steps[name]) or steps[name]
        for name, module, plan in row.children if name in steps
    ]
    n = len(blocks)
    lengths = {-(-n // every): every for every in range(n, 0, -1)}.values()
    kinds = ("lean",) if memory == "lean" else ("lean", "leanest")
    options = [_option(blocks, kind, every) for kind in kinds for every in lengths]
    return [_option(blocks, "balanced", 1), *options] if isinstance(memory, float) else options


def _option(blocks: Sequence[Held | Step], memory: str, every: int) -> Option:
    saved, peak, time, least = 0, 0, 0.0, memory == "leanest"
    for piece in _pieces(blocks, every):
        if isinstance(piece, Step):
            saved, peak = saved + piece.kept, max(peak, saved + piece.peak)
            continue
        kept = [held.kept - held.drops * least for held in piece]
        saved += piece[0].x + sum(kept) + piece[-1].mask
        live = saved + sum(held.x for held in piece[1:]) + sum(held.mask for held in piece[:-1])
        for held, own in zip(reversed(piece), reversed(kept), strict=True):
            peak = max(peak, live + held.work + held.drops * least)
            live -= own + held.x + held.mask
        time += sum(held.again for held in piece[:-1]) + sum(held.leanest for held in piece) * least
    return Option(memory, every, saved, peak, time)


def _pieces(blocks: Sequence[Held | Step], every: int) -> Iterable[Step | list[Held]]:
    """As `blocks/runs.py` cuts a row."""
    piece: list[Held] = []
    for block in blocks:
        if piece and (isinstance(block, Step) or block.projects or len(piece) == every):
            yield piece
            piece = []
        if isinstance(block, Step):
            yield block
        else:
            piece.append(block)
    if piece:
        yield piece
