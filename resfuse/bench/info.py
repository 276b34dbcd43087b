"""`python -m resfuse info`: what this machine runs, with what, what is missing and how to get it."""

from __future__ import annotations

import importlib.util

import torch
from rich.console import Console
from rich.table import Table

from .. import _native
from ..blocks.plans import PLANS
from ..kernels import dispatch
from ..kernels.interface import PRIMITIVES, Reason
from ..testing.environment import environment
from .implementations import choice

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What parts of resfuse want beside torch: a module, what for, and the package that has it.
WANTED = (
    ("torchvision", "bench, and fused torchvision models", "torchvision"),
    ("sklearn", "bench and verify: photographs, digits", "scikit-learn"),
    ("matplotlib", "figures", "matplotlib"),
)
BUILD_FACTS = ("torch", "torch_cuda", "compiler", "flags", "cuda_archs", "commit")


def show(device: torch.device, console: Console) -> None:
    facts = environment(device)
    _facts(console, "This machine", {k: v for k, v in facts.items() if k not in ("versions", "date", "device_type")})
    _facts(console, "Versions", {k: v or "-" for k, v in facts["versions"].items()})
    build = _native.build_facts()
    native = {k: build[k] for k in BUILD_FACTS if build.get(k) not in (None, [], "")}
    if not _native.unavailable():
        native["instructions of the CPU kernels"] = _native.load().cpu_isa()
    _facts(console, "Native library", native)
    console.print(_kernel_sets(device))
    console.print(_primitives(device))
    classes = Table(title="Classes with a fused form", title_justify="left")
    classes.add_column("module")
    classes.add_column("class")
    for name in sorted(PLANS):
        classes.add_row(*name.rsplit(".", 1))
    console.print(classes)
    console.print(_missing(device))


def missing(device: torch.device) -> list[Reason]:
    """What this machine lacks, each with the way to get it."""
    found = list(_native.unavailable())
    facts = _native.build_facts()
    if facts.get("module_left_out"):
        text = f"no module of build facts and launches in batches: {facts['module_left_out']}"
        found.append(Reason("module_missing", text))
    if not torch.cuda.is_available():
        built = "torch sees none" if torch.version.cuda else "this torch is built without CUDA"
        found.append(Reason("gpu_missing", f"no GPU: {built}; the CPU's kernel sets serve"))
    elif not facts.get("cuda_archs"):
        found.append(Reason("cuda_kernels_missing", f"no CUDA kernels: {facts.get('cuda_left_out', 'not built')}"))
    for module, purpose, package in WANTED:
        if importlib.util.find_spec(module) is None:
            found.append(Reason("package_missing", f"{module} ({purpose}): pip install {package}"))
    if device.type == "cpu" and not environment(device)["fast_bfloat16"]:
        found.append(Reason("no_bfloat16_instructions", "bfloat16 products are widened to float32 on this processor"))
    return found


def _facts(console: Console, title: str, facts: dict) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(name, ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))
    console.print(table)


def _kernel_sets(device: torch.device) -> Table:
    table = Table(title=f"Kernel sets on {device.type}", title_justify="left")
    for column in ("set", "status", "primitives", "serves alone", "or why not"):
        table.add_column(column)
    for name in dispatch.ORDER:
        chosen = dispatch.kernel_set(name)
        reasons = {reason for dtype in DTYPES for reason in chosen.unsupported(device.type, dtype)}
        lacking = len(PRIMITIVES) - len(chosen.PRIMITIVES)
        if lacking:
            reasons.add(Reason("primitive_missing", f"the next set serves its other {lacking} primitives"))
        alone = [_short(dtype) for dtype in DTYPES if not dispatch.missing(name, device.type, dtype)]
        table.add_row(
            name, chosen.STATUS, f"{len(chosen.PRIMITIVES)} of {len(PRIMITIVES)}", ", ".join(alone) or "-",
            "\n".join(f"{code}: {text}" for code, text in sorted(reasons)) or "-",
        )
    return table


def _primitives(device: torch.device) -> Table:
    table = Table(title=f"Which set serves which primitive on {device.type}, backend=auto", title_justify="left")
    table.add_column("primitive")
    served = {dtype: choice(device, dtype) for dtype in DTYPES}
    for dtype in DTYPES:
        table.add_column(_short(dtype))
    for primitive in PRIMITIVES:
        table.add_row(primitive, *(served[dtype][primitive] for dtype in DTYPES))
    return table


def _missing(device: torch.device) -> Table:
    table = Table(title="Missing here, and how to get it", title_justify="left")
    table.add_column("code")
    table.add_column("what")
    for code, text in missing(device) or [("-", "nothing")]:
        table.add_row(code, text)
    return table


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
