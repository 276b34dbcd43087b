"""Tables of a results file for a terminal."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console, Group
from rich.table import Table

from .results import PASSES


def show(results: dict, console: Console) -> None:
    """Every table that the results have rows for; nothing of speed where the gate is red."""
    console.print(errors_table(results["gate"]["rows"]))
    if not results["gate"]["passed"]:
        console.print("[bold red]The correctness gate is red: no speed was measured.[/]")
        return
    console.print(Group(memory_table(results["memory"]), times_table(results["times"])))
    for note in results["notes"]:
        where = f"{note['subject']}, {note['mode']}, {note['implementation']}"
        console.print(f"{where}: [bold]{note['code']}[/] {note['text']}", highlight=False)


def errors_table(rows: list[dict]) -> Table:
    table = _table("Error against float64 (median over seeds, norm of the difference over norm)")
    for name in ("subject", "mode", "result"):
        table.add_column(name)
    for name in ("batch", "seeds", "eager", "resfuse", "allowed", ""):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["subject"], row["mode"], row["quantity"], str(row["batch"]), str(row["seeds"]),
            f"{row['eager']:.2g}", f"{row['ours']:.2g}", f"{row['allowed']:.2g}",
            "[green]ok[/]" if row["passed"] else "[bold red]RED[/]",
        )
    return table


def memory_table(rows: list[dict]) -> Table:
    table = _table("Memory of a training step")
    for name in ("subject", "mode", "implementation"):
        table.add_column(name)
    for name in ("batch", "saved for backward", "units", "of eager", "peak", "of eager"):
        table.add_column(name, justify="right")
    place = _place(rows)
    for _, members in groupby(sorted(rows, key=place), key=place):
        group = list(members)
        eager = next((row for row in group if row["implementation"] == "eager"), None)
        for row in group:
            table.add_row(
                row["subject"], row["mode"], row["implementation"], str(row["batch"]), _mib(row["saved_bytes"]),
                "" if row["saved_units"] is None else f"{row['saved_units']:.2f}", _share(row, eager, "saved_bytes"),
                _mib(row["peak_bytes"]), _share(row, eager, "peak_bytes"),
            )
        table.add_section()
    return table


def times_table(rows: list[dict]) -> Table:
    table = _table("Time, interleaved; times faster than the faster of eager's layouts, with the median's interval")
    for name in ("subject", "mode", "implementation"):
        table.add_column(name)
    for name in ("batch", "rounds", *(f"{name} ms" for name in PASSES), *(f"{name} speed-up" for name in PASSES)):
        table.add_column(name, justify="right")
    for (subject, mode), group in groupby(rows, key=lambda row: (row["subject"], row["mode"])):
        by_name: dict[str, dict[str, dict]] = {}
        for row in group:
            by_name.setdefault(row["implementation"], {})[row["passes"]] = row
        for name, row in by_name.items():
            cells = [row[passes] for passes in PASSES]
            table.add_row(
                subject, mode, name, str(cells[0]["batch"]), str(cells[0]["seconds"]["rounds"]),
                *(f"{1e3 * cell['seconds']['median']:.4g}" for cell in cells),
                *(_ratio(cell["speedup"]) for cell in cells),
            )
        table.add_section()
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", header_style="", pad_edge=False)


def _place(rows: list[dict]):
    """Rows of one subject, mode and batch together, in the order in which each pair first came."""
    order: dict[tuple, int] = {}
    for row in rows:
        order.setdefault((row["mode"], row["subject"]), len(order))
    return lambda row: (order[row["mode"], row["subject"]], row["batch"])


def _ratio(speedup: dict | None) -> str:
    if speedup is None:
        return "1"
    return f"{speedup['median']:.2f} [{speedup['low']:.2f}, {speedup['high']:.2f}]"


def _share(row: dict, eager: dict | None, name: str) -> str:
    if row is eager or not eager or row[name] is None or not eager[name]:
        return ""
    return f"{row[name] / eager[name]:.3f}"


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.1f} MiB"
