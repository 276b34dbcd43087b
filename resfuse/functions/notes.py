"""What a step does, noted while it runs, without what nobody needs of it.

    with Notes(operands) as notes:
        result = call()
    again = source.steps(notes, result)          # again(stream, *operands) -> result

What nobody reads is left out; the same cast or view is made once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from ..kernels.interface import Native, Started, listening

aten = torch.ops.aten
SAME_MEMORY = aten.is_set_to.default  # a fact of the kind of call, not a value
EMPTY = {aten.empty.memory_format, aten.empty_strided.default, aten.new_empty.default, aten.new_empty_strided.default,
         aten.empty_like.default}  # fmt: skip
CAST, DETACH = aten._to_copy.default, aten.detach.default


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
    """function(*args, **kwargs), tensors as Values. operator: it is one of torch's, else a kernel's launch. addresses:
    a kernel is given those of tensors; native: its launch as a driver takes it."""

    function: Callable
    args: tuple
    kwargs: dict = field(default_factory=dict)
    made: list[Value | None] = field(default_factory=list)
    several: bool = False
    operator: bool = True
    addresses: bool = False
    native: Native | None = None

    @property
    def view(self) -> bool:
        return self.operator and (self.function is DETACH or getattr(self.function, "is_view", False))

    @property
    def pure(self) -> bool:
        """Whether it may be left out where nobody reads what it makes, or be made once for all."""
        return self.view or self.empty or (self.operator and self.function is CAST)

    @property
    def casts_weight(self) -> bool:
        """Whether it only reads what no step writes to."""
        if not (self.operator and self.function is CAST):
            return False
        owner = next(self.reads()).owner
        return owner.name.startswith("t") and len(owner.size) > 1

    @property
    def empty(self) -> bool:
        """Whether it is an allocation, of which no operand says more than its result does."""
        return self.operator and self.function in EMPTY

    def reads(self) -> Iterator[Value]:
        if not self.empty:
            yield from values((self.args, tuple(self.kwargs.values())))


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
                args, native = (*again.fixed, *self._of(again.operands)), again.native
                if native is not None:
                    native = native._replace(parameters=self._of(native.parameters))
                note = Note(again.function, args, operator=False, addresses=again.addresses, native=native)
                self.notes.append(note)
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

    def kept(self, result) -> tuple[list[Note], object] | None:
        """The notes that are needed, and the result as Values; None where it cannot be done again."""
        if not self.possible:
            return None
        try:
            result = self._of(result)
        except _Unknown:
            return None
        notes, result = _once(self.notes, result)
        return _read(notes, result), result


# What is left out ------------------------------------------------------------------------------------------------


def _once(notes: list[Note], result) -> tuple[list[Note], object]:
    """The notes, and the result, with each view, and each cast of a weight (no step writes to one), made once."""
    seen: dict[object, Note] = {}
    instead: dict[Value, Value] = {}
    kept = []
    for note in notes:
        note.args, note.kwargs = _renamed(note.args, instead), _renamed(note.kwargs, instead)
        if note.native is not None:
            note.native = note.native._replace(parameters=_renamed(note.native.parameters, instead))
        if note.view or note.casts_weight:
            key = note.function, _key(note.args), _key(note.kwargs)
            if key in seen:
                instead.update(zip(note.made, seen[key].made, strict=True))
                continue
            seen[key] = note
        kept.append(note)
    return kept, _renamed(result, instead)


def _read(notes: list[Note], result) -> list[Note]:
    """The notes whose results somebody reads, and those that do more than make some."""
    needed, kept = set(values(result)), []
    for note in reversed(notes):
        if note.pure and not any(value in needed for value in note.made):
            continue
        kept.append(note)
        needed.update(value.owner if note.addresses else value for value in note.reads())
    return kept[::-1]


def values(given) -> Iterator[Value]:
    """The Values in what is given."""
    if isinstance(given, Value):
        yield given
    elif isinstance(given, (list, tuple)):
        for each in given:
            yield from values(each)


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
