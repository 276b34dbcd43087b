"""Bytes and operations of each kernel or primitive of a step, and sums of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .ceilings import Ceilings
from .recording import Block, Call, Op, Recorder


class Work(NamedTuple):
    """bytes: what its kernels move; least: operands and results, each once; operations: of its products."""

    name: str
    block: Block
    bytes: int
    least: int
    operations: int


def works(recorder: Recorder) -> list[Work]:
    """Each primitive's call, and each operator that is part of none, in order."""
    found: dict[object, list[Op]] = {}
    for index, op in enumerate(recorder.ops):
        found.setdefault(("op", index) if op.call is None else op.call, []).append(op)
    return [
        Work(ops[0].name, ops[0].block, ops[0].bytes, ops[0].bytes, ops[0].operations) if ops[0].call is None
        else _called(recorder.calls[ops[0].call], ops)
        for ops in found.values()
    ]  # fmt: skip


def _called(call: Call, ops: list[Op]) -> Work:
    """What a primitive makes for itself alone counts in `bytes`, not in `least`."""
    reads: dict[int, int] = {}
    writes: dict[int, int] = {}
    for op in ops:
        for sizes, own in ((reads, op.reads), (writes, op.writes)):
            for storage, size in own.items():
                sizes[storage] = max(size, sizes.get(storage, 0))
    least = sum(size for storage, size in reads.items() if storage < call.before)
    least += sum(size for storage, size in writes.items() if storage < call.before or storage in call.given)
    return Work(call.primitive, call.block, sum(op.bytes for op in ops), least, call.operations)


class Total(NamedTuple):
    """Sums over works: GB, TFLOP, and the floor in ms of one work after the other, of `bytes` and of `least`."""

    calls: int
    gigabytes: float
    least_gigabytes: float
    teraflop: float
    floor_ms: float
    least_ms: float


def total(found: Iterable[Work], ceilings: Ceilings, dtype: str) -> Total:
    found = list(found)
    return Total(
        len(found), sum(w.bytes for w in found) / 1e9, sum(w.least for w in found) / 1e9,
        sum(w.operations for w in found) / 1e12,
        1e3 * sum(ceilings.seconds(w.bytes, w.operations, dtype) for w in found),
        1e3 * sum(ceilings.seconds(w.least, w.operations, dtype) for w in found),
    )  # fmt: skip
