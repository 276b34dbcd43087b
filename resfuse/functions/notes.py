"""What a step does, noted while it runs, and the function that does it again.

    with Notes(operands) as notes:
        result = call()
    again = notes.steps(result)                  # again(stream, *operands) -> result

    def steps(stream, t0, t1, ...):
        scratch = empty_strided((20480,), (1,), dtype=uint8, device=...)      # small tensors that only kernels see
        s, p0 = scratch.data_ptr(), t0.data_ptr()
        v0 = empty_strided((8, 64, 56, 56), (200704, 1, 3584, 64), ...)
        p1 = v0.data_ptr()
        run(784, 1, 1, stream, ..., (p0, None), p1, s + 1024, 25088, 64)      # a kernel, given addresses
        del v0                                                                # once it has been read for the last time
        return Made(...)

Kernels are given addresses, so that no view is made for them; what nobody reads is left out; the same cast or view is
made once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from ..kernels.interface import STREAM, Started, listening

aten = torch.ops.aten
SAME_MEMORY = aten.is_set_to.default  # a fact of the kind of call, not a value
EMPTY = {aten.empty.memory_format, aten.empty_strided.default, aten.new_empty.default, aten.new_empty_strided.default,
         aten.empty_like.default}  # fmt: skip
CAST, DETACH = aten._to_copy.default, aten.detach.default
SMALL, ALIGNMENT = 1 << 18, 256  # bytes: of a tensor that scratch memory has, and of where it begins there


@dataclass(eq=False)
class Value:
    """A tensor of the notes. owner: whose memory it views, from `offset` bytes on; itself where it has its own."""

    name: str
    size: tuple
    stride: tuple
    dtype: torch.dtype
    device: torch.device
    address: int
    offset: int = 0
    owner: Value = None

    def __post_init__(self):
        self.owner = self.owner or self

    @property
    def bytes(self) -> int:
        last = sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize if 0 not in self.size else 0


@dataclass(eq=False)
class Note:
    """function(*args, **kwargs), tensors as Values. operator: it is one of torch's, else a kernel's launch."""

    function: Callable
    args: tuple
    kwargs: dict = field(default_factory=dict)
    made: list[Value | None] = field(default_factory=list)
    several: bool = False
    operator: bool = True
    addresses: bool = False

    @property
    def view(self) -> bool:
        return self.operator and (self.function is DETACH or getattr(self.function, "is_view", False))

    @property
    def pure(self) -> bool:
        """Whether it may be left out where nobody reads what it makes, or be made once for all."""
        return self.view or self.empty or (self.operator and self.function is CAST)

    @property
    def empty(self) -> bool:
        """Whether it is an allocation, of which no operand says more than its result does."""
        return self.operator and self.function in EMPTY

    def reads(self) -> Iterator[Value]:
        if not self.empty:
            yield from _values((self.args, tuple(self.kwargs.values())))


class _Unknown(Exception):
    """A tensor that is neither an operand nor made on the way, or a value that depends on what tensors hold."""


class Notes(TorchDispatchMode):
    """Inside, every operator and launch is noted."""

    def __init__(self, tensors: Sequence[Tensor | None]):
        super().__init__()
        self.known = WeakTensorKeyDictionary()  # Value of each tensor
        self.notes: list[Note] = []
        self.possible = True
        self.count = len(tensors)
        self.operands = []
        for i, t in enumerate(tensors):
            if t is not None and t not in self.known:
                self.operands.append(self._value(t, f"t{i}"))

    def __enter__(self):
        listening.started = self._started
        return super().__enter__()

    def __exit__(self, *error):
        listening.started = None
        return super().__exit__(*error)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        if self.possible and operator is not SAME_MEMORY:
            try:
                self._note(Note(operator, self._of(args), self._of(kwargs)), result)
            except _Unknown:
                self.possible = False
        return result

    def _started(self, start: Callable[[], Started]) -> None:
        """Of a kernel that is no operator: start() starts it, and says how that is done again."""
        with _disable_current_modes():
            again = start()
        if self.possible:
            try:
                args = (*again.fixed, *self._of(again.operands))
                self.notes.append(Note(again.function, args, operator=False, addresses=again.addresses))
            except _Unknown:
                self.possible = False

    def _note(self, note: Note, result) -> None:
        note.several = isinstance(result, (list, tuple))
        for t in result if note.several else [result]:
            if t is not None and not isinstance(t, Tensor):
                raise _Unknown
            if t is None or t in self.known:  # an operand again, which was written to
                note.made.append(None)
                continue
            base = next(note.reads(), None) if note.view else None
            note.made.append(self._value(t, f"v{len(self.notes)}_{len(note.made)}", base))
        self.notes.append(note)

    def _value(self, t: Tensor, name: str, base: Value | None = None) -> Value:
        value = Value(name, tuple(t.shape), t.stride(), t.dtype, t.device, t.data_ptr())
        if base is not None:
            value.owner, value.offset = base.owner, value.address - base.owner.address
        self.known[t] = value
        return value

    def _of(self, given):
        """given with the Value of each tensor."""
        if isinstance(given, Tensor):
            value = self.known.get(given)
            if value is None:
                raise _Unknown
            return value
        if isinstance(given, dict):
            return {name: self._of(each) for name, each in given.items()}
        if isinstance(given, (list, tuple)) and not isinstance(given, torch.Size):
            parts = map(self._of, given)
            return type(given)(*parts) if hasattr(given, "_fields") else type(given)(parts)
        return given

    def steps(self, result) -> Callable | None:
        """(stream, *operands) -> result, doing what was noted; None where that cannot be."""
        source = self.source(result)
        return None if source is None else source.function()

    def source(self, result) -> Source | None:
        if not self.possible:
            return None
        try:
            result = self._of(result)
        except _Unknown:
            return None
        notes, result = _once(self.notes, result)
        return Source(_read(notes, result), result, self.count, self.operands)


# What is left out ------------------------------------------------------------------------------------------------


def _once(notes: list[Note], result) -> tuple[list[Note], object]:
    """The notes, and the result, with each view, and each cast of a weight (no step writes to one), made once."""
    seen: dict[object, Note] = {}
    instead: dict[Value, Value] = {}
    kept = []
    for note in notes:
        note.args, note.kwargs = _renamed(note.args, instead), _renamed(note.kwargs, instead)
        if note.view or (note.operator and note.function is CAST and _of_weight(note)):
            key = note.function, _key(note.args), _key(note.kwargs)
            if key in seen:
                instead.update(zip(note.made, seen[key].made, strict=True))
                continue
            seen[key] = note
        kept.append(note)
    return kept, _renamed(result, instead)


def _of_weight(note: Note) -> bool:
    owner = next(note.reads()).owner
    return owner.name.startswith("t") and len(owner.size) > 1


def _read(notes: list[Note], result) -> list[Note]:
    """The notes whose results somebody reads, and those that do more than make some."""
    needed, kept = set(_values(result)), []
    for note in reversed(notes):
        if note.pure and not any(value in needed for value in note.made):
            continue
        kept.append(note)
        needed.update(value.owner if note.addresses else value for value in note.reads())
    return kept[::-1]


def _values(given) -> Iterator[Value]:
    if isinstance(given, Value):
        yield given
    elif isinstance(given, (list, tuple)):
        for each in given:
            yield from _values(each)


def _renamed(given, instead: dict[Value, Value]):
    if isinstance(given, Value):
        return instead.get(given, given)
    if isinstance(given, dict):
        return {name: _renamed(each, instead) for name, each in given.items()}
    if isinstance(given, (list, tuple)) and not isinstance(given, torch.Size):
        parts = (_renamed(each, instead) for each in given)
        return type(given)(*parts) if hasattr(given, "_fields") else type(given)(parts)
    return given


def _key(given):
    """Something to compare arguments by."""
    if isinstance(given, dict):
        return tuple((name, _key(each)) for name, each in given.items())
    if isinstance(given, (list, tuple)):
        return tuple(map(_key, given))
    return type(given), given


# The function ----------------------------------------------------------------------------------------------------


class Source:
    """Python for notes."""

    def __init__(self, notes: list[Note], result, count: int, operands: Sequence[Value]):
        self.notes, self.result, self.count, self.operands = notes, result, count, operands
        self.constants: dict[str, object] = {}
        self.names: dict[object, str] = {}
        self.addressed = {value.owner for note in notes if note.addresses for value in note.reads()}
        self.scratch = self._scratch()  # value: where in scratch memory it begins

    def function(self) -> Callable:
        exec(self.text(), self.constants)
        return self.constants["steps"]

    def text(self) -> str:
        lines, left = [], Counter(_values(self.result))
        needs = [{v.owner if note.addresses else v for v in note.reads()} for note in self.notes]
        for each in needs:
            left.update(each)
        for note, needed in zip(self.notes, needs, strict=True):
            lines += self._lines(note)
            left.subtract(needed)
            dead = [v.name for v in {*note.made, *needed} - {None, *self.operands, *self.scratch} if left[v] == 0]
            if dead:
                lines.append(f"del {', '.join(sorted(dead))}")
        names = ", ".join(f"t{i}" for i in range(self.count))
        addresses = [f"p_{v.name} = {v.name}.data_ptr()" for v in self.operands if v in self.addressed]
        head = [f"def steps(stream, {names}):", *self._scratch_lines(), *addresses]
        return "\n    ".join([*head, *lines, f"return {self._text(self.result)}"])

    def _scratch(self) -> dict[Value, int]:
        """Small tensors that nobody but kernels sees."""
        seen = {v for note in self.notes if not note.addresses for v in note.reads()} | set(_values(self.result))
        made = [note.made[0] for note in self.notes if note.empty]
        places, end = {}, 0
        for value in made:
            if value not in seen and value.bytes <= SMALL:
                places[value] = end
                end += -(-value.bytes // ALIGNMENT) * ALIGNMENT
        self.scratch_bytes = end
        return places

    def _scratch_lines(self) -> list[str]:
        if not self.scratch:
            return []
        device = next(iter(self.scratch)).device
        return [f"scratch = {self._empty((self.scratch_bytes,), (1,), torch.uint8, device)}", "s = scratch.data_ptr()"]

    def _empty(self, size: tuple, stride: tuple, dtype: torch.dtype, device: torch.device) -> str:
        of = f"dtype={self._constant(dtype)}, device={self._constant(device)}"
        return f"{self._constant(torch.empty_strided)}({size}, {stride}, {of})"

    def _lines(self, note: Note) -> list[str]:
        if not note.operator:
            inner = ", ".join(self._text(each, note.addresses) for each in note.args)
            return [f"{self._constant(note.function)}({inner})"]
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

    def _text(self, given, addresses: bool = False) -> str:
        """An expression for a value. addresses: for tensors those of their memory."""
        if given is STREAM:
            return "stream"
        if isinstance(given, Value):
            if not addresses:
                return given.name
            if given.owner in self.scratch:
                return f"s + {self.scratch[given.owner] + given.offset}"
            return f"p_{given.owner.name}" + (f" + {given.offset}" if given.offset else "")
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
