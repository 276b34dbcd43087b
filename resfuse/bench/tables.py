"""Tables of a results file for a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .results import EVALUATION, TRAINING

BASELINES = ("eager", "eager NCHW")
SHORT = dict(zip((*TRAINING, *EVALUATION), ("fwd", "fwd+bwd", *EVALUATION), strict=True))


def show(results: dict, console: Console) -> None:
    """Every table that the results have rows for; nothing of speed where the gate is red."""
    console.print(errors_table(results["gate"]["rows"]))
    for row in results["gate"]["rows"]:
        if not row["passed"]:
            console.print(
                f"[bold red]RED[/] {row['subject']}, {row['mode']}, {row['implementation']}: {row['quantity']} "
                f"has error {row['ours']:.3g}, allowed {row['allowed']:.3g}", highlight=False,
            )
    if not results["gate"]["passed"]:
        console.print("[bold red]The correctness gate is red: no speed was measured.[/]")
        return
    console.print(memory_table(results["memory"]))
    console.print(times_table(results["times"]))
    for note in results["notes"]:
        where = f"{note['subject']}, {note['mode']}, {note['implementation']}"
        console.print(f"{where}: [bold]{note['code']}[/] {note['text']}", highlight=False)


def errors_table(rows: list[dict]) -> Table:
    """A row for each subject, mode and fused implementation: eager's error and ours."""
    table = _table("Error against float64, eager > resfuse (norm of the difference over norm, median of seeds)")
    for name in ("subject", "mode", "batch", "seeds", "output", "dx or gradient", "nearest to its limit", "gate"):
        table.add_column(name, justify="right" if name in ("batch", "seeds") else "left")
    for group in _groups(rows, "subject", "mode", "implementation", "batch"):
        found = {row["quantity"]: row for row in group}
        names = [name for name in ("out", "logits", "dx", "gradient") if name in found]
        worst = max(found, key=lambda name: found[name]["ours"] / max(found[name]["allowed"], 1e-300))
        first = group[0]
        table.add_row(
            first["subject"], _mode(first["mode"]), str(first["batch"]), str(first["seeds"]),
            *(_pair(found[name]) for name in names), f"{worst} {_pair(found[worst])}",
            "[green]pass[/]" if all(row["passed"] for row in group) else "[bold red]RED[/]",
        )
    return table


def memory_table(rows: list[dict]) -> Table:
    """Saved bytes at each subject's largest batch, and wherever torch.compile has some; peaks where they were taken."""
    names = _implementations(rows)
    table = _table("Memory of a training step in MiB: saved for backward (of eager's), and peak")
    for name in ("subject", "mode"):
        table.add_column(name)
    for name in ("batch", *(f"{name} saved" for name in names), *(f"{name} peak" for name in names)):
        table.add_column(name, justify="right")
    for group in _groups(rows, "subject", "mode"):
        largest = max(row["batch"] for row in group)
        for batch in sorted({row["batch"] for row in group}):
            found = {row["implementation"]: row for row in group if row["batch"] == batch}
            eager = found.get("eager")
            compared = batch == largest or any(name not in ("eager", "resfuse") for name in found)
            saved = [_size(found.get(name), "saved_bytes", eager) if compared else "" for name in names]
            peaks = [_size(found.get(name), "peak_bytes", eager) for name in names]
            table.add_row(group[0]["subject"], _mode(group[0]["mode"]), str(batch), *saved, *peaks)
    return table


def times_table(rows: list[dict]) -> Table:
    """Milliseconds and, in paired rounds, how many times faster than the faster of eager's layouts."""
    names = [name for name in _implementations(rows) if name not in BASELINES]
    table = _table("Time in ms, interleaved; x: times faster than eager, with the interval of the median")
    for name in ("subject", "mode", "pass"):
        table.add_column(name)
    for name in ("batch", "rounds", "eager", *names):
        table.add_column(name, justify="right")
    for group in _groups(rows, "mode", "subject", "batch"):
        for passes in dict.fromkeys(row["passes"] for row in group):
            found = {row["implementation"]: row for row in group if row["passes"] == passes}
            baseline = found[next(iter(found.values()))["baseline"]]
            layout = " (NCHW)" if baseline["layout"] == "NCHW" else ""
            table.add_row(
                baseline["subject"], _mode(baseline["mode"]), SHORT[passes], str(baseline["batch"]),
                str(baseline["seconds"]["rounds"]), f"{_ms(baseline)}{layout}",
                *(_speed(found.get(name)) for name in names),
            )
    return table


def _table(title: str) -> Table:
    return Table(title=f"\n{title}", title_justify="left", title_style="bold", header_style="dim", box=None)


def _groups(rows: list[dict], *keys: str) -> Iterable[list[dict]]:
    """Rows that agree in `keys`, in the order in which each combination first came."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups.values()


def _implementations(rows: list[dict]) -> list[str]:
    found = {row["implementation"]: None for row in rows if row["implementation"] != "eager NCHW"}
    return sorted(found, key=lambda name: (name.startswith("resfuse"), name not in BASELINES))


def _mode(mode: str) -> str:
    """'autocast-bfloat16' as 'bf16 autocast'."""
    kind, _, dtype = mode.rpartition("-")
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[dtype]
    return f"{short} {kind}" if kind else short


def _pair(row: dict) -> str:
    return f"{row['eager']:.2g} > {row['ours']:.2g}"


def _size(row: dict | None, name: str, eager: dict | None) -> str:
    if row is None or row[name] is None:
        return ""
    size = f"{row[name] / 2**20:.1f}"
    return size if row is eager or not eager or not eager[name] else f"{size} ({row[name] / eager[name]:.3f})"


def _speed(row: dict | None) -> str:
    if row is None:
        return ""
    speedup = row["speedup"]
    interval = f"[{speedup['low']:.2f}-{speedup['high']:.2f}]"
    return escape(f"{_ms(row)}  x{speedup['median']:.2f} {interval}")


def _ms(row: dict) -> str:
    milliseconds = 1e3 * row["seconds"]["median"]
    return f"{milliseconds:.3g}" if milliseconds < 1000 else f"{milliseconds:.0f}"
