"""What an ideal pointwise compiler would move: eager's operators, recorded, with every pointwise one put into a kernel
that reads or writes its operands anyway. Convolutions, products and pools stay the vendor's; BatchNorm is a pass for
its sums, which may make its operand, and pointwise behind that. It is a model of such compilers, not one of them.

A pointwise result is written where a vendor's kernel or the other phase reads it. Others are made again by each reader,
or written by the first of them, whichever moves less.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from .recording import Block, Op
from .work import Work

POINTWISE = (
    "add", "add_", "clone", "copy_", "div", "hardswish", "hardswish_", "hardswish_backward", "hardtanh", "hardtanh_",
    "hardtanh_backward", "leaky_relu", "leaky_relu_", "leaky_relu_backward", "mul", "mul_", "relu", "relu_", "sigmoid",
    "sigmoid_backward", "silu", "silu_", "silu_backward", "sub", "threshold_backward", "_to_copy",
)  # fmt: skip
NORMS = ("batch_norm", "batch_norm_backward")


@dataclass
class Value:
    """A tensor as one operator left it. sources: of a pointwise one what it is made of. readers: whether each is the
    vendor's, and its phase. stored: whether it lies in memory."""

    size: int
    op: Op | None = None
    sources: list[Read] = field(default_factory=list)
    readers: list[tuple[bool, str]] = field(default_factory=list)
    stored: bool = True
    write: bool = False


class Read(NamedTuple):
    """A value, and how many bytes of it are read: a view's are fewer."""

    value: Value
    size: int

    def leaves(self) -> dict[int, Read]:
        """What has to be read, or written on the way, to have the value."""
        if self.value.stored or self.value.write:
            return {id(self.value): self}
        return _all(source.leaves() for source in self.value.sources)


def _all(found: Iterable[dict[int, Read]]) -> dict[int, Read]:
    """Each value once, as much of it as the one that reads most."""
    merged: dict[int, Read] = {}
    for leaves in found:
        for key, leaf in leaves.items():
            merged[key] = max(leaf, merged.get(key, leaf), key=lambda read: read.size)
    return merged


@dataclass
class Step:
    """An operator of eager's, or one of a BatchNorm's two passes, with the values that it reads and gives."""

    op: Op
    name: str
    pointwise: bool
    reads: list[Read]
    gives: list[Value]
    vendor: bool = False


def pointwise_fused(ops: list[Op]) -> list[Work]:
    """The kernels that eager's operators come down to."""
    steps = _steps(ops)
    for step in steps:  # in order: what a value costs to make again depends on those before it
        for value in step.gives if step.pointwise else ():
            value.write = _is_written(value)
    works: list[Work] = []
    for step in steps:
        if step.vendor:
            works += [_kernel(*_own(read.value), [read], []) for read in step.reads if _waits(read.value)]
            works.append(Work(step.name, step.op.block, step.op.bytes, step.op.bytes, step.op.operations))
        elif not step.pointwise:
            works.append(_kernel(step.name, step.op.block, step.reads, step.gives))
    ends = [value for step in steps if step.pointwise for value in step.gives if _waits(value)]
    return works + [_kernel(*_own(value), [Read(value, value.size)], []) for value in ends]


def _steps(ops: list[Op]) -> list[Step]:
    now: dict[int, Value] = {}  # by storage
    steps: list[Step] = []

    def value(storage: int, size: int) -> Value:
        return now.setdefault(storage, Value(size))

    def add(op: Op, name: str, reads: list[Read], pointwise: bool, vendor: bool, writes: dict[int, int]) -> None:
        gives = [Value(size, op, reads if pointwise else [], stored=not pointwise) for size in writes.values()]
        for read in reads:
            read.value.readers.append((vendor, op.block.phase))
        now.update(zip(writes, gives, strict=True))
        steps.append(Step(op, name, pointwise, reads, gives, vendor))

    for op in ops:
        reads = [Read(value(storage, size), size) for storage, size in op.reads.items()]
        if op.name.endswith(NORMS):
            widest = max(op.writes, key=op.writes.get)
            add(op, "sums", reads, False, False, {s: size for s, size in op.writes.items() if s != widest})
            sums = [Read(each, each.size) for each in steps[-1].gives]
            add(op, op.name, reads + sums, True, False, {widest: op.writes[widest]})
        else:
            pointwise = op.name in POINTWISE
            add(op, op.name, reads, pointwise, not pointwise, op.writes)
    return steps


def _is_written(value: Value) -> bool:
    phases = {phase for _, phase in value.readers}
    if not value.readers or any(vendor for vendor, _ in value.readers) or phases != {value.op.block.phase}:
        return True
    leaves = _all(source.leaves() for source in value.sources)
    count, made = len(value.readers), sum(leaf.size for leaf in leaves.values())
    return made + count * value.size < count * made


def _waits(value: Value) -> bool:
    return value.write and not value.stored


def _own(value: Value) -> tuple[str, Block]:
    return value.op.name, value.op.block


def _kernel(name: str, block: Block, wanted: list[Read], gives: list[Value]) -> Work:
    """Reads what makes the wanted values, writes those on the way that are to be written, and what it gives."""
    reads: dict[int, Read] = {}
    written: dict[int, Value] = {}

    def need(read: Read) -> None:
        for key, leaf in read.leaves().items():
            if not _waits(leaf.value):
                reads.update(_all([{key: leaf}, {key: reads.get(key, leaf)}]))
            elif key not in written:
                written[key] = leaf.value
                for source in leaf.value.sources:
                    need(source)

    for read in wanted:
        need(read)
    for value in written.values():
        value.stored = True
    moved = sum(read.size for read in reads.values()) + sum(value.size for value in (*written.values(), *gives))
    return Work(name, block, moved, moved, 0)
