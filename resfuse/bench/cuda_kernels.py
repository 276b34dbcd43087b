"""`python -m resfuse info --kernels`: what the CUDA kernels are compiled to. Needs no GPU."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from .. import _native
from ..testing import cubin

ARCH = "sm_90a"  # where the library has no kernels to read


def show(console: Console) -> None:
    if _native.build_record().get("cuda_archs") and cubin.reader():
        kernels, of = cubin.read(_native.LIBRARY), "of the native library"
    elif cubin.unavailable():
        sys.exit(cubin.unavailable())
    else:
        kernels, of = cubin.compile_all(ARCH), f"compiled for {ARCH} (the native library has none)"
    table = Table(title=f"CUDA kernels {of}", title_justify="left")
    for column in ("kernel", "arch"):
        table.add_column(column, no_wrap=True)
    for column in ("threads", "registers", "shared", "stack", "blocks", *cubin.INSTRUCTIONS):
        table.add_column(column, justify="right")
    for k in sorted(kernels, key=lambda k: (k.arch, k.name)):
        facts = (k.arch, k.threads, k.registers, k.shared, k.stack, k.blocks, *k.instructions.values())
        table.add_row(k.name, *("-" if fact is None else str(fact) for fact in facts))
    console.print(table)
    console.print(
        "shared: bytes of a block, without those that a launch of products adds; stack: bytes of a thread, spills "
        "among them; blocks: that fit on a multiprocessor at once by these; then instructions.",
        highlight=False,
    )
