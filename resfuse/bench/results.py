"""Rows of a benchmark and the JSON file they go into. Every row names its subject, mode, implementation and batch."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..testing.timing import Ratio, Summary

SCHEMA = 1
COLUMNS = ("subject", "mode", "implementation", "layout", "batch", "what", "value", "low", "high")
TRAINING = ("forward", "forward+backward")
EVALUATION = ("no_grad", "inference_mode")


@dataclass(frozen=True)
class ErrorRow:
    """Median relative errors against float64 over `seeds` draws of one result (`quantity`)."""

    subject: str
    mode: str
    implementation: str
    batch: int
    quantity: str
    seeds: int
    eager: float
    ours: float
    allowed: float
    passed: bool


@dataclass(frozen=True)
class MemoryRow:
    """Bytes kept between forward and backward; `saved_units` in width-channel activations, for blocks; `peak_bytes`
    of a forward and backward, None where only the saved bytes were taken at this batch."""

    subject: str
    mode: str
    implementation: str
    layout: str
    batch: int
    saved_bytes: int
    saved_units: float | None
    peak_bytes: int | None


@dataclass(frozen=True)
class TimeRow:
    """Seconds of one pass, and how many times faster than `baseline`, eager's faster layout, in paired rounds.

    passes is one of TRAINING or EVALUATION. speedup is None for the baseline itself.
    """

    subject: str
    mode: str
    implementation: str
    layout: str
    batch: int
    passes: str
    seconds: Summary
    images_per_second: float
    baseline: str
    speedup: Ratio | None


@dataclass(frozen=True)
class NoteRow:
    """Something that was not measured, or not as asked: a stable code and a sentence."""

    subject: str
    mode: str
    implementation: str
    code: str
    text: str


@dataclass
class Results:
    """Everything one run found. `gate_passed` None: the gate has not run to its end."""

    kind: str
    command: str
    environment: dict
    gate_passed: bool | None = None
    errors: list[ErrorRow] = field(default_factory=list)
    memory: list[MemoryRow] = field(default_factory=list)
    times: list[TimeRow] = field(default_factory=list)
    notes: list[NoteRow] = field(default_factory=list)
    kernels: dict[str, dict[str, str]] = field(default_factory=dict)
    compile_seconds: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def as_dict(self) -> dict:
        rows = {
            name: [_plain(row) for row in getattr(self, name)] for name in ("errors", "memory", "times", "notes")
        }
        gate = {"passed": self.gate_passed, "rows": rows.pop("errors")}
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            "command": self.command,
            "environment": self.environment,
            "seconds": round(self.seconds, 1),
            "gate": gate,
            "kernels": self.kernels,
            "compile_seconds": self.compile_seconds,
            **rows,
        }

    def write(self, path: str | Path) -> None:
        """The JSON file, and what was measured as a table: a CSV file beside it."""
        write_json(path, self.as_dict())
        with open(Path(path).with_suffix(".csv"), "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(COLUMNS)
            table.writerows(self.measured())

    def measured(self) -> Iterator[tuple]:
        """A row of COLUMNS for each number."""
        for row in self.errors:
            key = row.subject, row.mode, row.implementation, None, row.batch
            yield *key, f"error of {row.quantity}", row.ours, None, None
            yield *key, f"eager's error of {row.quantity}", row.eager, None, None
        for row in self.memory:
            key = row.subject, row.mode, row.implementation, row.layout, row.batch
            yield *key, "saved bytes", row.saved_bytes, None, None
            if row.peak_bytes is not None:
                yield *key, "peak bytes", row.peak_bytes, None, None
        for row in self.times:
            key = row.subject, row.mode, row.implementation, row.layout, row.batch
            yield *key, f"seconds of {row.passes}", row.seconds.median, row.seconds.low, row.seconds.high
            if row.speedup is not None:
                yield *key, f"speed-up of {row.passes}", row.speedup.median, row.speedup.low, row.speedup.high


def write_json(path: str | Path, content: dict) -> None:
    """Write by renaming, so that a cut-off run leaves the file as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def _plain(row) -> dict:
    return {
        name: value._asdict() if isinstance(value, (Summary, Ratio)) else value for name, value in asdict(row).items()
    }
