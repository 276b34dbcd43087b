"""The README's table from a results file of `python -m resfuse bench`: python benchmarks/readme.py results.json"""

import json
import sys
from pathlib import Path

MODES = ("float32", "autocast-bfloat16")
HEAD = (
    "| | kept for backward | peak of a step | time, float32 | time, bf16 autocast |",
    "|---|---|---|---|---|",
)


def rows(results: dict) -> list[str]:
    """One line per subject, batch and pass: resfuse as a share of eager's bytes, float32 / bf16, and its speed against
    eager's faster layout."""
    times = [row for row in results["times"] if row["implementation"] != "eager" and row["passes"] != "forward"]
    lines = []
    for key in dict.fromkeys((row["subject"], row["batch"], row["passes"]) for row in times):
        subject, batch, passes = key
        found = [row for row in times if (row["subject"], row["batch"], row["passes"]) == key]
        name = subject if passes == "forward+backward" else f"{subject} ({passes})"
        cells = [
            f"{name}, batch {batch}",
            _shares(results["memory"], subject, batch, "saved_bytes"),
            _shares(results["memory"], subject, batch, "peak_bytes"),
            *(_speed({row["implementation"]: row for row in found if row["mode"] == mode}) for mode in MODES),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _shares(memory: list[dict], subject: str, batch: int, field: str) -> str:
    """Ours over eager's in each mode, "-" where that was not counted at this batch."""
    found = []
    for mode in MODES:
        at = [row for row in memory if (row["subject"], row["mode"], row["batch"]) == (subject, mode, batch)]
        sizes = {row["implementation"]: row[field] for row in at}
        known = sizes.get("resfuse") and sizes.get("eager")
        found.append(f"{sizes['resfuse'] / sizes['eager']:.2f}x" if known else "-")
    return " / ".join(found) if set(found) != {"-"} else "-"


def _speed(found: dict[str, dict]) -> str:
    if "resfuse" not in found:
        return "-"
    own = found["resfuse"]["speedup"]
    cell = f"{own['median']:.2f}x ({own['low']:.2f}-{own['high']:.2f})"
    if "torch.compile" in found:
        cell += f", torch.compile {found['torch.compile']['speedup']['median']:.2f}x"
    return cell


if __name__ == "__main__":
    print("\n".join([*HEAD, *rows(json.loads(Path(sys.argv[1]).read_text()))]))
