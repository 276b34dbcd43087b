"""The classical experiments on residual networks, run on fused blocks and real images.

Depth, lesions, gradients by path length, stochastic depth, shattered gradients: each prints what it measured and a
verdict computed from it. All networks are pre-activated (`study/networks.py`), plain and residual ones alike but for
the skip. Exit code 0 if every claim held, 1 if one did not.

    python -m examples.residual_study                        # scikit-learn's digits, some minutes on two cores
    python -m examples.residual_study --cifar10 FOLDER --device cuda
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.study.base import CIFAR10, DIGITS, QUICK, Finding, Study
from examples.study.data import cifar10, digits
from examples.study.experiments import EXPERIMENTS
from examples.study.figure import plot
from resfuse.bench.results import SCHEMA, write_json
from resfuse.testing.environment import environment

NAME = "residual-study"


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        data = cifar10(options.cifar10) if options.cifar10 else digits()
    except FileNotFoundError as missing:
        parser.error(str(missing))
    settings = QUICK if options.quick else CIFAR10 if options.cifar10 else DIGITS
    study = Study(data.to(options.device), settings, options.seed, options.device)
    console, began, findings = Console(), time.perf_counter(), []
    for experiment in EXPERIMENTS:
        findings.append(experiment(study))
        show(findings[-1], console)
    seconds = time.perf_counter() - began
    summarise(findings, console)
    fallbacks = study.fallbacks()
    for row in fallbacks:
        console.print(f"[yellow]ran the original forward[/] {' '.join(map(str, row))}", highlight=False)

    content = {
        "schema": SCHEMA,
        "kind": NAME,
        "command": shlex.join(["python", "-m", "examples.residual_study", *arguments]),
        "environment": environment(options.device),
        "seconds": round(seconds, 1),
        "data": data.name,
        "seed": options.seed,
        "settings": asdict(settings),
        "fallbacks": fallbacks,
        "held": all(finding.held for finding in findings),
        "experiments": {finding.name: finding.as_dict() for finding in findings},
    }
    write_json(options.out / f"{NAME}.json", content)
    facts = content["environment"]
    title = f"{data.name}, seed {options.seed}: {facts['device']}, torch {facts['versions']['torch']}, " + (
        f"commit {facts['commit'] or 'unknown'}"
    )
    plot(content["experiments"], title, options.out / f"{NAME}.png")
    console.print(f"{seconds:.0f} s; {NAME}.json and {NAME}.png are in {options.out}", highlight=False)
    return 0 if content["held"] else 1


def show(finding: Finding, console: Console) -> None:
    table = Table(title=finding.title, title_justify="left", title_style="bold")
    for index, column in enumerate(finding.columns):
        table.add_column(column, justify="right" if index else "left")
    for row in finding.rows:
        table.add_row(*row)
    console.print(table)


def summarise(findings: Sequence[Finding], console: Console) -> None:
    table = Table(title="Verdicts", title_justify="left", title_style="bold", show_lines=True)
    for column in ("experiment", "claim", "verdict"):
        table.add_column(column)
    for finding in findings:
        for claim in finding.claims:
            table.add_row(finding.name, claim.sentence, "[green]held[/]" if claim.held else "[bold red]did not hold[/]")
    console.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(NAME), metavar="FOLDER", help=f"default: {NAME}")
    parser.add_argument("--quick", action="store_true", help="seconds, on networks too small to show anything")
    parser.add_argument("--cifar10", type=Path, metavar="FOLDER", help="CIFAR-10's python pickles, instead of digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    return parser


if __name__ == "__main__":
    sys.exit(main())
