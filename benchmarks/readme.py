"""The README's table from a results file of `python -m resfuse bench`: python benchmarks/readme.py results.json"""

import json
import sys
from pathlib import Path

HEAD = (
    "| | kept for backward | peak of a step | forward + backward | error of out | of dx |",
    "|---|---|---|---|---|---|",
)
QUANTITIES = ("out", "dx")


def rows(results: dict) -> list[str]:
    """One line per subject and mode: resfuse as a share of eager, speed against eager's faster layout, and errors
    against float64, ours beside eager's."""
    lines = []
    for time in results["times"]:
        if time["implementation"] != "resfuse" or time["passes"] != "forward+backward":
            continue
        key = time["subject"], time["mode"]
        memory = {row["implementation"]: row for row in _of(results["memory"], key) if row["batch"] == time["batch"]}
        largest = max(row["batch"] for row in _of(results["memory"], key))
        saved = {row["implementation"]: row for row in _of(results["memory"], key) if row["batch"] == largest}
        errors = {row["quantity"]: row for row in _of(results["gate"]["rows"], key)}
        speed = time["speedup"]
        cells = [
            f"{time['subject']}, {time['mode']}, batch {time['batch']}",
            f"{_share(saved, 'saved_bytes')} (batch {largest})",
            _share(memory, "peak_bytes"),
            f"{speed['median']:.2f}x ({speed['low']:.2f}-{speed['high']:.2f})",
            *(_errors(errors.get(quantity)) for quantity in QUANTITIES),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _of(found: list[dict], key: tuple[str, str]) -> list[dict]:
    return [row for row in found if (row["subject"], row["mode"]) == key]


def _share(rows_by_name: dict[str, dict], field: str) -> str:
    ours, eager = (rows_by_name.get(name, {}).get(field) for name in ("resfuse", "eager"))
    return f"{ours / eager:.2f}x" if ours and eager else "-"


def _errors(row: dict | None) -> str:
    return "-" if row is None else f"{row['ours']:.1e} (eager {row['eager']:.1e})"


if __name__ == "__main__":
    print("\n".join([*HEAD, *rows(json.loads(Path(sys.argv[1]).read_text()))]))
