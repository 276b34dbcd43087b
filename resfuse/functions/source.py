"""The function that does again what was noted.

    def steps(stream, t0, t1, ...):
        scratch = empty_strided((20480,), (1,), uint8)                        # tensors that only kernels see
        s, p0 = scratch.data_ptr(), t0.data_ptr()
        v0 = empty_strided((8, 64, 56, 56), (200704, 1, 3584, 64), ...)
        p1 = v0.data_ptr()
        batch(stream, p0, p1, s)                                              # some kernels, given addresses
        run(784, 1, 1, stream, ..., (p0, None), p1, s + 1024, 25088, 64)      # one that cannot be in a batch
        del v0                                                                # once it has been read for the last time
        return Made(...)

Kernels are given addresses, so that no view is made for them. Launches wait until something has to come after them, so
that many are one call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from torch._C._dynamo import guards

from ..kernels.interface import STREAM
from .notes import Note, Notes, Value, values

# Bytes: of a tensor that scratch memory has, where one begins there, and of one that memory may have for too long.
SCRATCH, ALIGNMENT, SMALL = 4 << 20, 256, 1 << 18


def steps(notes: Notes, result) -> Callable | None:
    """(stream, *operands) -> result, doing what was noted; None where that cannot be."""
    kept = notes.kept(result)
    return None if kept is None else Source(*kept, notes.count, notes.operands).function()


class Source:
    """Python for notes."""

    def __init__(self, notes: list[Note], result, count: int, operands: Sequence[Value]):
        self.notes, self.result, self.count, self.operands = notes, result, count, operands
        self.constants: dict[str, object] = {}
        self.names: dict[object, str] = {}
        self.addressed = {value.owner for note in notes if note.addresses for value in note.reads()}
        self.scratch, self.scratch_bytes = self._scratch()

    def function(self) -> Callable:
        exec(self.text(), self.constants)
        return self.constants["steps"]

    def text(self) -> str:
        names = ", ".join(f"t{i}" for i in range(self.count))
        addresses = [f"p_{v.name} = {v.name}.data_ptr()" for v in self.operands if v in self.addressed]
        head = [f"def steps(stream, {names}):", *self._scratch_lines(), *addresses]
        return "\n    ".join([*head, *self._body(), f"return {self._text(self.result)}"])

    # The order of things -----------------------------------------------------------------------------------------

    def _body(self) -> Iterator[str]:
        launches: list[Note] = []  # those that wait, and what nobody reads after them
        dead: list[Value] = []
        left = Counter(values(self.result))
        needs = [{v.owner if note.addresses else v for v in note.reads()} for note in self.notes]
        for each in needs:
            left.update(each)
        for note, needed in zip(self.notes, needs, strict=True):
            if not note.operator:
                launches.append(note)
            else:
                if not self._may_overtake(note, dead):
                    yield from self._flushed(launches, dead)
                    launches, dead = [], []
                yield from self._operator(note)
            left.subtract(needed)
            dead += [v for v in {*note.made, *needed} - {None, *self.operands, *self.scratch} if left[v] == 0]
        yield from self._flushed(launches, dead)

    def _may_overtake(self, note: Note, dead: Sequence[Value]) -> bool:
        """Whether an operator may come before the launches that wait, and before the memory of the dead is free."""
        if note.view:
            return True
        small = sum(v.bytes for v in note.made if v is not None) <= SMALL
        if note.empty:
            return small or note.made[0] in self.scratch or all(self._frees(v) <= SMALL for v in dead)
        return small and note.casts_weight

    def _frees(self, value: Value) -> int:
        return 0 if value.owner in self.operands else value.owner.bytes

    def _flushed(self, launches: Sequence[Note], dead: Sequence[Value]) -> Iterator[str]:
        for native, group in groupby(launches, key=lambda note: note.native is not None):
            run = list(group)
            yield from [self._batch(run)] if native else map(self._launch, run)
        if dead:
            yield f"del {', '.join(sorted(v.name for v in dead))}"

    # Scratch memory ----------------------------------------------------------------------------------------------

    def _scratch(self) -> tuple[dict[Value, int], int]:
        """Where tensors that nobody but kernels sees begin in one memory, and its size. Two have the same place where
        the last kernel that one is given comes before the first of the other: kernels run in order."""
        seen = {v for note in self.notes if not note.addresses for v in note.reads()} | set(values(self.result))
        spans: dict[Value, tuple[int, int]] = {}
        for i, note in enumerate(self.notes):
            for value in {v.owner for v in note.reads()} if note.addresses else ():
                spans[value] = (spans.get(value, (i, i))[0], i)
        places, end = {}, 0
        for value in (note.made[0] for note in self.notes if note.empty):
            if value not in seen and value.bytes <= SCRATCH:
                places[value] = self._first_fit(value, spans, places)
                end = max(end, places[value] + value.bytes)
        return places, end

    @staticmethod
    def _first_fit(value: Value, spans: dict[Value, tuple[int, int]], places: dict[Value, int]) -> int:
        first, last = spans[value]
        beside = [v for v in places if spans[v][0] <= last and first <= spans[v][1]]
        place = 0
        for other in sorted(beside, key=places.get):
            if place + value.bytes <= places[other]:
                break
            place = max(place, -(-(places[other] + other.bytes) // ALIGNMENT) * ALIGNMENT)
        return place

    def _scratch_lines(self) -> list[str]:
        if not self.scratch:
            return []
        device = next(iter(self.scratch)).device
        return [f"scratch = {self._empty((self.scratch_bytes,), (1,), torch.uint8, device)}", "s = scratch.data_ptr()"]

    # Lines -------------------------------------------------------------------------------------------------------

    def _batch(self, run: Sequence[Note]) -> str:
        indices: dict[str, int] = {}
        launches = []
        for note in run:
            parameters = []
            for each in note.native.parameters:
                if isinstance(each, Value):
                    base, offset = self._address(each)
                    each = indices.setdefault(base, len(indices)), offset
                parameters.append(each)
            launches.append((*note.native.launch, parameters))
        return f"{self._constant(run[0].native.batch(launches))}({', '.join(['stream', *indices])})"

    def _launch(self, note: Note) -> str:
        inner = ", ".join(self._text(each, note.addresses) for each in note.args)
        return f"{self._constant(note.function)}({inner})"

    def _operator(self, note: Note) -> list[str]:
        if note.empty:
            value = note.made[0]
            if value in self.scratch:
                return []
            text = self._empty(value.size, value.stride, value.dtype, value.device)
        else:
            inner = [*map(self._text, note.args), *(f"{name}={self._text(v)}" for name, v in note.kwargs.items())]
            text = f"{self._constant(note.function._op)}({', '.join(inner)})"
        if any(note.made):
            names = ", ".join("_" if value is None else value.name for value in note.made)
            text = f"{names}{',' if note.several else ''} = {text}"
        return [text, *(f"p_{v.name} = {v.name}.data_ptr()" for v in note.made if v in self.addressed)]

    def _empty(self, size: tuple, stride: tuple, dtype: torch.dtype, device: torch.device) -> str:
        """On the current device, as code that torch compiles does it: in half the time."""
        quick = getattr(guards, f"_empty_strided_{device.type}", None)
        if quick is not None:
            return f"{self._constant(quick)}({size}, {stride}, {self._constant(dtype)})"
        of = f"dtype={self._constant(dtype)}, device={self._constant(device)}"
        return f"{self._constant(torch.empty_strided)}({size}, {stride}, {of})"

    def _address(self, value: Value) -> tuple[str, int]:
        """The name of an address, and the offset from there."""
        if value.owner in self.scratch:
            return "s", self.scratch[value.owner] + value.offset
        return f"p_{value.owner.name}", value.offset

    def _text(self, given, addresses: bool = False) -> str:
        """An expression for a value. addresses: for tensors those of their memory."""
        if given is STREAM:
            return "stream"
        if isinstance(given, Value):
            if not addresses:
                return given.name
            base, offset = self._address(given)
            return f"{base} + {offset}" if offset else base
        if isinstance(given, (list, tuple)) and not isinstance(given, torch.Size):
            inner = ", ".join(self._text(each, addresses) for each in given)
            if isinstance(given, list):
                return f"[{inner}]"
            if hasattr(given, "_fields") and not addresses:
                return f"{self._constant(type(given))}({inner})"
            return f"({inner},)" if given else "()"
        if given is None or type(given) in (bool, int, str):
            return repr(given)
        return self._constant(given)

    def _constant(self, value) -> str:
        key = (type(value), value)
        try:
            name = self.names.get(key)
        except TypeError:  # it cannot be compared
            key, name = id(value), None
        if name is None:
            name = self.names[key] = f"c{len(self.constants)}"
            self.constants[name] = value
        return name
