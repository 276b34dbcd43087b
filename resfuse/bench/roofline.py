"""`python -m resfuse roofline`: the bytes, operations and floors of a model's training step, by block and by primitive:
eager, pointwise fusion, ours. Counted, not measured; needs no GPU."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ..kernels import triton
from ..testing.environment import environment
from ..testing.roofline.ceilings import SHEETS, Ceilings, measured
from ..testing.roofline.fusion import pointwise_fused
from ..testing.roofline.recording import record
from ..testing.roofline.work import Total, Work, total, works
from . import roofline_plots
from .results import SCHEMA, write_json

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
EAGER, FUSED, OURS = "eager", "pointwise fusion", "resfuse"


def run(
    model: str, batch: int, pixels: int, dtype: str, device: str, results: Path | None, json_path: Path | None,
    png_path: Path | None, console: Console,
) -> None:
    """dtype: of DTYPES; device: of SHEETS, whose sheet is used where there is no results file with ceilings."""
    reasons = triton.unavailable()
    if reasons:
        sys.exit("; ".join(reason.text for reason in reasons))
    ceilings = SHEETS[device] if results is None else measured(results)
    found = step(builder(model), batch, pixels, DTYPES[dtype])
    content = {
        "schema": SCHEMA, "kind": "roofline", "command": shlex.join(["python", "-m", "resfuse", *sys.argv[1:]]),
        "environment": environment(), "model": model, "batch": batch, "pixels": pixels,
        **summary(found, ceilings, DTYPES[dtype]),
    }  # fmt: skip
    show(content, console)
    if json_path is not None:
        write_json(json_path, content)
    if png_path is not None:
        roofline_plots.plot(content, png_path)


def builder(name: str) -> Callable[[], nn.Module]:
    """torchvision's model of the name, or timm's."""
    from torchvision import models

    if name in models.list_models():
        return partial(models.get_model, name, weights=None)
    import timm

    if not timm.is_model(name):
        sys.exit(f"neither torchvision nor timm has a model {name}")
    return partial(timm.create_model, name)


def step(build: Callable[[], nn.Module], batch: int, pixels: int, dtype: str) -> dict[str, list[Work]]:
    """The works of a training step, optimizer left out, by implementation. dtype: that of autocast, or float32."""
    autocast = None if dtype == "float32" else getattr(torch, dtype)
    eager, ours = (record(build, (batch, 3, pixels, pixels), autocast, fused=fused) for fused in (False, True))
    return {EAGER: works(eager), FUSED: pointwise_fused(eager.ops), OURS: works(ours)}


def summary(found: dict[str, list[Work]], ceilings: Ceilings, dtype: str) -> dict:
    """Ready for JSON: totals by implementation, by block and phase, by primitive or operator."""

    def totals(chosen: Iterable[Work]) -> dict:
        return {key: round(v, 6) for key, v in _total(chosen)._asdict().items()}

    def _total(chosen: Iterable[Work]) -> Total:
        return total(chosen, ceilings, dtype)

    def grouped(mine: list[Work], key: Callable[[Work], str]) -> dict[str, dict]:
        groups: dict[str, list[Work]] = {}
        for work in mine:
            groups.setdefault(key(work), []).append(work)
        return {name: totals(group) for name, group in groups.items()}

    return {
        "dtype": dtype,
        "ceilings": {"device": ceilings.device, "source": ceilings.source, "bandwidth": ceilings.bandwidth,
                     "rate": ceilings.rates[dtype]},
        "totals": {name: totals(mine) for name, mine in found.items()},
        "phases": {name: grouped(mine, lambda w: w.block.phase) for name, mine in found.items()},
        "blocks": {name: grouped(mine, lambda w: w.block.name) for name, mine in found.items()},
        "kernels": {name: grouped(mine, lambda w: w.name) for name, mine in found.items()},
    }  # fmt: skip


def show(content: dict, console: Console) -> None:
    limits = content["ceilings"]
    console.print(
        f"{content['model']}, batch {content['batch']}, {content['pixels']} px, {content['dtype']}: a training step "
        f"without its optimizer, counted.\nCeilings: {limits['bandwidth'] / 1e12:.2f} TB/s, "
        f"{limits['rate'] / 1e12:.0f} TFLOP/s ({limits['source']}).", highlight=False,
    )
    console.print(_table("Whole step", totals_table(content)))
    console.print(_table("Blocks, forward and backward", blocks_table(content)))
    console.print(_table("resfuse's primitives, and operators that are part of none", primitives_table(content)))


def totals_table(content: dict) -> list[list[str]]:
    """Rows of cells, the first its head. Shares are of eager's floor."""
    eager = content["totals"][EAGER]["floor_ms"]
    rows = [["", "calls", "GB", "TFLOP", "floor, ms", "of eager's", "forward, ms", "backward, ms"]]
    for name, t in content["totals"].items():
        phases = (f"{content['phases'][name][phase]['floor_ms']:.2f}" for phase in ("forward", "backward"))
        rows.append([name, str(t["calls"]), f"{t['gigabytes']:.1f}", f"{t['teraflop']:.2f}", f"{t['floor_ms']:.2f}",
                     f"{t['floor_ms'] / eager:.0%}", *phases])
    t = content["totals"][OURS]
    phases = (f"{content['phases'][OURS][phase]['least_ms']:.2f}" for phase in ("forward", "backward"))
    rows.append([f"{OURS}, each primitive in one pass", str(t["calls"]), f"{t['least_gigabytes']:.1f}",
                 f"{t['teraflop']:.2f}", f"{t['least_ms']:.2f}", f"{t['least_ms'] / eager:.0%}", *phases])
    return rows


def blocks_table(content: dict) -> list[list[str]]:
    rows = [["block", *(f"{name}, GB" for name in content["blocks"]), *(f"{name}, ms" for name in content["blocks"]),
             "of eager's"]]
    for block in content["blocks"][EAGER]:
        found = [mine.get(block, {"gigabytes": 0.0, "floor_ms": 0.0}) for mine in content["blocks"].values()]
        share = found[-1]["floor_ms"] / found[0]["floor_ms"]
        rows.append([block, *(f"{t['gigabytes']:.2f}" for t in found), *(f"{t['floor_ms']:.2f}" for t in found),
                     f"{share:.0%}"])
    return rows


def primitives_table(content: dict, least: float = 0.005) -> list[list[str]]:
    """Most floor first; those below a share `least` of all are left out."""
    limits, whole = content["ceilings"], content["totals"][OURS]["floor_ms"]
    rows = [["", "calls", "GB", "operands and results, GB", "TFLOP", "floor, ms", "of all", "arithmetic's part"]]
    for name, t in sorted(content["kernels"][OURS].items(), key=lambda each: -each[1]["floor_ms"]):
        if t["floor_ms"] >= least * whole:
            arithmetic = 1e15 * t["teraflop"] / limits["rate"] / t["floor_ms"]
            rows.append([name, str(t["calls"]), f"{t['gigabytes']:.2f}", f"{t['least_gigabytes']:.2f}",
                         f"{t['teraflop']:.2f}", f"{t['floor_ms']:.2f}", f"{t['floor_ms'] / whole:.0%}",
                         f"{arithmetic:.0%}"])
    return rows


def markdown(rows: list[list[str]]) -> list[str]:
    """Lines of a table, as docs/roofline.md has them."""
    head, *rest = rows
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rest)]


def _table(title: str, rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if index else "left")
    for row in rows[1:]:
        table.add_row(*row)
    return table
