"""The command lines of `python -m resfuse`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..testing.cases import CASES
from ..testing.comparison import MODES
from ..testing.roofline.ceilings import SHEETS
from . import agree, coverage, cuda_kernels, info, kernels, peers, plot, profile, roofline, tables, tune, verify
from .implementations import IMPLEMENTATIONS, RESFUSE, Implementation
from .plan import Plan, plan
from .run import run
from .workloads import NETWORKS


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="python -m resfuse", description="Measure and check resfuse on this machine.")
    commands = root.add_subparsers(dest="command", required=True)

    bench = commands.add_parser("bench", help="eager, torch.compile and resfuse: error, memory, time")
    extent = bench.add_mutually_exclusive_group()
    for name, text in (
        ("quick", "two stages and ResNet-50, without torch.compile"),
        ("full", "every stage, projection and relative, torch.compile everywhere"),
    ):
        extent.add_argument(f"--{name}", dest="extent", action="store_const", const=name, help=text)
    bench.set_defaults(extent="default")
    bench.add_argument("--budget", type=_positive, metavar="SECONDS", help="time to measure in (default: by extent)")
    bench.add_argument("--json", type=Path, default=Path("resfuse-bench.json"), metavar="PATH", help="results file")
    bench.add_argument("--png", type=Path, default=Path("resfuse-bench.png"), metavar="PATH", help="figure")

    training = commands.add_parser("verify", help="train a small network on digits, eager and fused")
    training.add_argument("--steps", type=int, default=200)
    training.add_argument("--seeds", type=int, default=3)
    training.add_argument("--json", type=Path, metavar="PATH", help="results file")
    training.add_argument("--png", type=Path, metavar="PATH", help="figure of the loss curves")

    facts = commands.add_parser("info", help="device, versions, kernel sets, what is missing and how to get it")
    facts.add_argument("--kernels", action="store_true", help="what the CUDA kernels are compiled to; needs no GPU")
    compiled = commands.add_parser("kernels", help="what the Triton kernels are compiled to; needs no GPU")
    compiled.add_argument("--arch", type=int, choices=(80, 86, 89, 90, 100), default=90, help="default: 90")
    compiled.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    reach = commands.add_parser("coverage", help="what fuse reaches of each model of a library; needs no GPU")
    reach.add_argument("models", nargs="*", help="default: all of them")
    reach.add_argument("--library", choices=coverage.LIBRARIES, default="torchvision")
    reach.add_argument("--json", type=Path, metavar="PATH", help="results file")
    same = commands.add_parser("agree", help="each model of a library fused, beside its eager twin; needs no GPU")
    same.add_argument("models", nargs="*", help="default: all convolutional ones with BatchNorm")
    same.add_argument("--library", choices=coverage.LIBRARIES, default="torchvision")
    same.add_argument("--json", type=Path, metavar="PATH", help="results file, gone on with where it stops")
    theirs = commands.add_parser("peers", help="a library's own model tests on fused models; needs no GPU")
    theirs.add_argument("--library", choices=tuple(peers.FILES), required=True)
    theirs.add_argument("--json", type=Path, metavar="PATH", help="results file")
    theirs.add_argument("checkout", type=Path, help="folder of the library's repository, at the installed version")
    theirs.add_argument("pytest", nargs=argparse.REMAINDER, metavar="...", help="pytest's arguments, such as -k EXPR")
    tuning = commands.add_parser("tune", help="the Triton kernels' tiles measured on a GPU; prints a new launch table")
    tuning.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    tuning.add_argument("--batch", type=int, default=256)
    tuning.add_argument("--seconds", type=_positive, default=1.0, help="for each comparison of tiles (default: 1)")
    where = commands.add_parser("profile", help="where a step's time and memory go, by torch.profiler")
    where.add_argument("--subject", choices=(*NETWORKS, *CASES), default="resnet50", metavar="NAME",
                       help="a network or block of the bench command (default: resnet50)")
    where.add_argument("--mode", choices=MODES, default="float32")
    where.add_argument("--batch", type=int, default=8)
    where.add_argument("--steps", type=int, default=3)
    where.add_argument("--implementations", default="eager,resfuse", metavar="NAMES",
                       help=f"of {', '.join(IMPLEMENTATIONS)}; default: eager,resfuse")
    where.add_argument("--out", type=Path, default=Path("resfuse-profile"), metavar="FOLDER")
    where.add_argument("--capture", action="store_true", help="steps of resfuse for nsys to record: make profile")
    floors = commands.add_parser("roofline", help="bytes, operations and floors of a model's step; needs no GPU")
    floors.add_argument("--model", default="resnet50", help="of torchvision or timm (default: resnet50)")
    floors.add_argument("--batch", type=int, default=256)
    floors.add_argument("--pixels", type=int, default=224)
    floors.add_argument("--dtype", choices=roofline.DTYPES, default="bf16", help="autocast's, or fp32 (default: bf16)")
    floors.add_argument("--device", choices=SHEETS, default="h200", help="whose data sheet is taken (default: h200)")
    floors.add_argument("--ceilings", type=Path, metavar="PATH", help="results file of a device, in place of a sheet")
    floors.add_argument("--json", type=Path, metavar="PATH", help="results file")
    floors.add_argument("--png", type=Path, metavar="PATH", help="figure")
    for command in (bench, training, facts, tuning, where):
        command.add_argument(
            "--device", type=torch.device, default=_default_device(), help="default: cuda if there is one"
        )
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 1 where the gate is red, a fused model failed, training strays or a peer's test fails."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    if options.command == "bench":
        chosen = plan(options.device, options.extent, options.budget)
        return bench(chosen, _recorded(arguments), options.json, options.png, options.device, console)
    if options.command == "verify":
        found = verify.verify(range(options.seeds), options.steps, options.device)
        verify.show(found, console)
        verify.write(found, options.json, options.png)
        return 0 if found.passed else 1
    if options.command == "agree":
        return 0 if agree.show(options.library, options.models, options.json, console) else 1
    if options.command == "peers":
        return peers.run(options.library, options.checkout, options.pytest, options.json, console)
    if options.command == "profile" and options.capture:
        profile.capture(options.subject, options.mode, options.batch, RESFUSE.name, options.steps, options.device)
    elif options.command == "profile":
        profile.run(
            options.subject, options.mode, options.batch, options.implementations.split(","), options.steps,
            options.device, options.out, console,
        )
    elif options.command == "roofline":
        roofline.run(
            options.model, options.batch, options.pixels, options.dtype, options.device, options.ceilings,
            options.json, options.png, console,
        )
    elif options.command == "coverage":
        coverage.show(options.library, options.models, options.json, console)
    elif options.command == "kernels":
        kernels.show(options.arch, getattr(torch, options.dtype), console)
    elif options.command == "tune":
        tune.run(getattr(torch, options.dtype), options.batch, options.seconds, options.device, console)
    elif options.kernels:
        cuda_kernels.show(console)
    else:
        info.show(options.device, console)
    return 0


def bench(
    chosen: Plan,
    command: str,
    json_path: Path,
    png_path: Path,
    device: torch.device,
    console: Console,
    implementations: Mapping[str, Implementation] = IMPLEMENTATIONS,
) -> int:
    """Run, write and show; the results file is written on a red gate too, and holds no speed then. As `main`."""
    columns = (BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=1.0)
        results = run(
            chosen, command, device, implementations=implementations,
            progress=lambda text, share: progress.update(task, description=text, completed=share),
        )
    results.write(json_path)
    console.print(results.environment["device"], highlight=False)
    tables.show(results.as_dict(), console)
    written = [json_path]
    if results.gate_passed:
        plot.plot(results.as_dict(), png_path)
        written.append(png_path)
    console.print(f"{results.seconds:.0f} s; wrote {' and '.join(map(str, written))}", highlight=False)
    return 0 if results.gate_passed and not any(note.code == "failed" for note in results.notes) else 1


CAPS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")


def _recorded(arguments: Sequence[str]) -> str:
    """The command as the results file has it: with the caps on instruction sets, without the places of the files."""
    kept = []
    for previous, argument in zip(("", *arguments), arguments, strict=False):
        if not {previous, argument} & {"--json", "--png"} and not argument.startswith(("--json=", "--png=")):
            kept.append(argument)
    caps = [f"{name}={os.environ[name]}" for name in CAPS if name in os.environ]
    return shlex.join([*caps, "python", "-m", "resfuse", *kept])


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
