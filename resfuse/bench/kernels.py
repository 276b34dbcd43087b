"""`python -m resfuse kernels`: what the Triton kernels of a training step are compiled to. Needs no GPU."""

from __future__ import annotations

import sys

import torch
from rich.console import Console
from rich.table import Table

from ..kernels import triton

UNITS = ("wgmma", "tcgen05", "mma.sync")


def show(arch: int, dtype: torch.dtype, console: Console) -> None:
    reasons = triton.unavailable()
    if reasons:
        sys.exit("; ".join(reason.text for reason in reasons))
    from ..testing.triton import steps

    names = steps.FULL_SIZE
    compiler = steps.compile_steps(arch, dtype, names, tf32=torch.backends.cudnn.allow_tf32)
    kernels = {**compiler.kernels, **steps.compile_activations(arch, dtype, [256]).kernels}
    title = f"Kernels of {len(names)} blocks, and of activations behind 256 channels, for sm_{arch}, {dtype}"
    table = Table(title=title, title_justify="left")
    for column in ("kernel", "tile", "warps", "stages", "registers", "shared KiB", "blocks", "spills", "products",
                   "in flight: loads", "products", "MB"):
        table.add_column(column, justify="left" if column in ("kernel", "tile", "products") else "right")
    for k in sorted(kernels.values(), key=lambda k: (k.name, str(k.tile), k.registers)):
        unit = next((unit for unit in UNITS if unit in k.instructions), "-")
        table.add_row(
            k.name.removeprefix("_"), "x".join(map(str, k.tile)), *map(str, (k.warps, k.stages, k.registers)),
            f"{k.shared / 1024:.1f}", *map(str, (k.blocks, k.spills)), unit + (" serialised" if k.serialized else ""),
            *map(str, (k.loads_in_flight, k.products_in_flight)), f"{k.bytes / 1e6:.1f}",
        )
    console.print(table)
    console.print(
        f"blocks: that fit on a multiprocessor at once; MB: of all operands of the largest launch, at most "
        f"{steps.BATCH} samples. Not measured on a GPU.", highlight=False,
    )
