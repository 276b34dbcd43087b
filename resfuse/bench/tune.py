"""`python -m resfuse tune`: the Triton set's launch choices, measured on the GPU at hand.

The calls of training steps are noted, primitive by primitive, with their operands; each tile that they take is then
varied one size at a time, towards what is faster, until nothing is. Convolutions with a window are measured by the
vendor and by our own kernels. What comes out is printed as lines of `resfuse/kernels/triton/_table.py`, and changes
nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import MappingProxyType, SimpleNamespace
from typing import NamedTuple

import torch
from rich.console import Console

import resfuse

from ..kernels import dispatch
from ..kernels.triton import _table
from ..kernels.triton._launch import arch
from ..kernels.triton._table import Own, Tile
from ..testing.cases import PROJECTIONS, STAGES, Case, make_block, make_gradient, make_input
from ..testing.timing import interleave, summary

LEAST_GAIN = 1.02  # below it a change is noise
LIMITS = {"rows": (32, 256), "channels": (32, 256), "depth": (32, 128), "warps": (4, 16), "stages": (1, 5)}
LARGEST = 128 * 256  # sums of a tile

Timer = Callable[[Mapping[object, Callable[[], object]]], dict[object, float]]


class Key(NamedTuple):
    """What a tile is chosen by."""

    primitive: str
    dtype: torch.dtype
    channels: int
    outer: int


class Noted(NamedTuple):
    """A primitive's call in a step: how to repeat it, and the choices that it asked for."""

    repeat: Callable[[], object]
    tiles: frozenset[Key]
    windows: frozenset[Own]


class Choice(NamedTuple):
    """A tile, or whether a window is our own, that is `gain` times as fast as what the table has."""

    key: Key | Own
    chosen: Tile | bool
    gain: float


def tune(cases: Sequence[Case], dtype: torch.dtype, device: torch.device, timer: Timer) -> list[Choice]:
    """What is at least LEAST_GAIN times as fast as what the table says."""
    noted, found, best, made = note(cases, dtype, device), [], {}, arch(torch.empty(0, device=device))
    for key in sorted({key for call in noted for key in call.tiles}, key=str):
        choice = _climbed(key, [call for call in noted if key in call.tiles], timer, made)
        found.append(choice)
        best[key] = choice.chosen
    for own in sorted({own for call in noted for own in call.windows}, key=str):
        calls, current = [call for call in noted if own in call.windows], own in _table.WINDOWS
        times = timer({ours: _under(calls, best, {own: ours}) for ours in (False, True)})
        found.append(Choice(own, not current, times[current] / times.get(not current, float("inf"))))
    return [choice for choice in found if choice.gain >= LEAST_GAIN]


def note(cases: Sequence[Case], dtype: torch.dtype, device: torch.device) -> list[Noted]:
    """The calls of a training step of each case that choose something, those alike once."""
    noted: dict[object, Noted] = {}
    chosen = dispatch.kernels("triton", device.type, dtype)

    def noting(function: Callable) -> Callable:
        def call(*args, **kwargs):
            tiles, windows = set(), set()
            with _table_with(tiles, windows):
                result = function(*args, **kwargs)
            if windows:  # what they would ask for if they were ours
                with _table_with(tiles, windows, {}, dict.fromkeys(windows, True)):
                    function(*args, **kwargs)
            if tiles or windows:
                call = Noted(lambda: function(*args, **kwargs), frozenset(tiles), frozenset(windows))
                noted.setdefault((function, *call[1:]), call)
            return result

        return call

    functions = {name: function for name, function in vars(chosen).items() if callable(function)}
    spying = SimpleNamespace(replays={}, **{name: noting(function) for name, function in functions.items()})
    before = dispatch.kernels
    dispatch.kernels = lambda *_: spying
    try:
        for case in cases:
            block = resfuse.fuse(make_block(case, device=device), config=resfuse.FuseConfig(backend="triton"))
            x = make_input(case, dtype, device=device).requires_grad_()
            with nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype):
                out = block(x)
            out.backward(make_gradient(case, out.dtype, device=device))
    finally:
        dispatch.kernels = before
    return list(noted.values())


def neighbours(tile: Tile) -> Iterator[Tile]:
    """Tiles that differ in one size, twice or half, a stage more or less; or in a side and the warps alike, by which a
    thread keeps the sums that it has."""
    sides = [name for name in ("rows", "channels") if getattr(tile, name)]
    for names in (*((name,) for name in LIMITS), *((name, "warps") for name in sides)):
        sizes = {name: getattr(tile, name) for name in names}
        if not all(sizes.values()) or ("stages" in sizes and tile.depth == 0 and tile.stages == 1):  # nothing is summed
            continue
        for step in (-1, 1):
            others = {n: size + step if n == "stages" else int(size * 2.0**step) for n, size in sizes.items()}
            varied = replace(tile, **others)
            fits = all(LIMITS[name][0] <= other <= LIMITS[name][1] for name, other in others.items())
            if fits and varied.rows * varied.channels <= LARGEST:
                yield varied


def gpu_timer(device: torch.device, seconds: float) -> Timer:
    """Medians, interleaved; what does not compile or fit is left out."""
    from triton.errors import TritonError

    def measured(calls: Mapping[object, Callable[[], object]]) -> dict[object, float]:
        able = {}
        for name, call in calls.items():
            try:
                call()
            except TritonError:
                continue
            able[name] = call
        times = interleave(able, budget=seconds, minimum=5, maximum=50, device=device, host=False)
        return {name: summary(each).median for name, each in times.items()}

    return measured


def show(choices: Sequence[Choice], device: str, made: int, console: Console) -> None:
    """The choices as lines of the launch table, and of its set of windows."""
    if not choices:
        console.print(f"Nothing is {LEAST_GAIN - 1:.0%} faster on {device} than the launch table's choices.")
    for key, chosen, gain in choices:
        if isinstance(key, Own):
            verb = "add to" if chosen else "take from"
            console.print(f"    {verb} WINDOWS: {key!r},  # {gain:.2f}x", highlight=False, soft_wrap=True)
            continue
        sizes = ", ".join(str(getattr(chosen, name)) for name in LIMITS)
        tile = f'Tile({sizes}, "{device}: {gain:.2f}x", {chosen.shares})'
        console.print(
            f'    "{key.primitive}": Rule({tile}, {key.dtype.itemsize}, {key.channels}, range({made}, {made + 1}), '
            f"range({key.outer}, {key.outer + 1})),", highlight=False, soft_wrap=True,
        )  # fmt: skip


def _climbed(key: Key, calls: Sequence[Noted], timer: Timer, made: int) -> Choice:
    best = first = _table.tile(*key[:3], made, key.outer)
    gain, tried = 1.0, {first}
    windows = {own: own.kernel == key.primitive for call in calls for own in call.windows}
    while candidates := [tile for tile in neighbours(best) if tile not in tried]:
        tried.update(candidates)
        times = timer({tile: _under(calls, {key: tile}, windows) for tile in (best, *candidates)})
        fastest = min(times, key=times.get)
        if times[best] < LEAST_GAIN * times[fastest]:
            break
        best, gain = fastest, gain * times[best] / times[fastest]
    return Choice(key, best, gain)


def _under(calls: Sequence[Noted], tiles: Mapping[Key, Tile], windows: Mapping[Own, bool]) -> Callable[[], None]:
    """The calls, repeated with other choices."""

    def repeated() -> None:
        with _table_with(set(), set(), tiles, windows):
            for call in calls:
                call.repeat()

    return repeated


@contextmanager
def _table_with(
    asked_tiles: set[Key], asked_windows: set[Own], tiles: Mapping[Key, Tile] = MappingProxyType({}),
    windows: Mapping[Own, bool] = MappingProxyType({}),
) -> Iterator[None]:
    """The launch table with some other choices; what it is asked for goes into the sets."""
    tile, ours = _table.tile, _table.ours

    def chosen_tile(primitive: str, dtype: torch.dtype, channels: int, arch: int, outer: int = 1) -> Tile:
        key = Key(primitive, dtype, channels, outer)
        asked_tiles.add(key)
        return tiles[key] if key in tiles else tile(primitive, dtype, channels, arch, outer)

    def chosen_window(*arguments) -> bool:
        own = _table.own(*arguments)
        asked_windows.add(own)
        return windows[own] if own in windows else ours(*arguments)

    _table.tile, _table.ours = chosen_tile, chosen_window
    try:
        yield
    finally:
        _table.tile, _table.ours = tile, ours


def run(dtype: torch.dtype, batch: int, seconds: float, device: torch.device, console: Console) -> None:
    """Tune for ResNet-50's bottlenecks on a GPU, and print."""
    if device.type != "cuda" or not torch.cuda.is_available():
        sys.exit("tune needs a GPU: torch.cuda.is_available() is False here, or --device is another.")
    reasons = dispatch.missing("triton", device.type, dtype)
    if reasons:
        sys.exit("; ".join(reason.text for reason in reasons))
    cases = [replace(case, batch=batch) for case in (*STAGES, *PROJECTIONS)]
    index = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    choices = tune(cases, dtype, index, gpu_timer(index, seconds))
    show(choices, torch.cuda.get_device_name(index), arch(torch.empty(0, device=index)), console)
