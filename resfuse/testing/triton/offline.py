"""Triton kernels compiled for a GPU that is not there, through the real launch path, and read.

    with compiled_for(90) as compiler:
        step(block)             # on the CPU, backend="triton": what is launched is compiled and not run
    for kernel in compiler.kernels.values(): print(kernel.registers, kernel.spills)

A launch specialises a kernel as a GPU's would: integers and addresses that are multiples of 16, arguments that are
None. What else a step does, the vendor's convolutions say, is done on whatever the memory holds.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver

from .. import occupancy
from .runners import instead

# Shared memory that a block may have, by architecture.
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
ARCHITECTURES = (80, 89, 90, 100)
INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async", "mma.sync": r"mma\.sync", "tcgen05": r"tcgen05\.mma",
    "cp.async 16": r"cp\.async\.cg\.shared\.global[^;]*0x10", "cp.async": r"cp\.async\.c[ag]\.shared\.global",
    "ld 16": r"ld\.global[\w.:]*\.v4", "ld": r"ld\.global", "st 16": r"st\.global[\w.:]*\.v4", "st": r"st\.global",
    "max": r"max\.f32", "max.NaN": r"max\.NaN\.f32", "barrier": r"bar\.sync|barrier\.sync",
}  # fmt: skip


@dataclass
class Kernel:
    """What a compiled kernel takes and does."""

    name: str
    arch: int
    settings: dict[str, object]
    stages: int
    registers: int
    spills: int
    stack: int
    shared: int
    warps: int
    serialized: bool
    instructions: dict[str, int]
    loads_in_flight: int  # groups of asynchronous loads that the main loop leaves running
    products_in_flight: int
    bytes: int = 0  # of all operands of its largest launch

    @property
    def tile(self) -> list[int]:
        return [value for name, value in self.settings.items() if name.startswith("BLOCK")]

    @property
    def even(self) -> bool:
        """Whether every tile is a whole one: the fast path."""
        return all(value for name, value in self.settings.items() if name.startswith("EVEN"))

    @property
    def blocks(self) -> int:
        """Blocks that fit on a multiprocessor at once."""
        return occupancy.blocks(self.arch, self.registers, self.shared, 32 * self.warps)


class FakeDriver:
    """A driver that only answers; its device's number is the architecture, so that each has a cache of its own."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda")

    def is_active(self) -> bool:
        return True


class Compiler:
    """An `_launch.Instead` that compiles. kernels: what was compiled, by hash; launches: in order, each with its name
    and the bytes of its operands, each of them counted once."""

    def __init__(self, arch: int):
        self.arch = arch
        self.kernels: dict[str, Kernel] = {}
        self.launches: list[tuple[str, int]] = []

    def __call__(self, kernel, programs: int, args: tuple, options: dict) -> None:
        compiled = kernel.warmup(*map(_meta, args), grid=(1,), **options)
        moved = sum({id(t): t.numel() * t.element_size() for t in _tensors(args)}.values())
        self.launches.append((kernel.fn.__name__, moved))
        if compiled.hash not in self.kernels:
            self.kernels[compiled.hash] = _read(kernel.fn.__name__, self.arch, options, compiled)
        self.kernels[compiled.hash].bytes = max(self.kernels[compiled.hash].bytes, moved)


@contextmanager
def compiled_for(arch: int) -> Iterator[Compiler]:
    """Inside, the Triton set serves the CPU, and its kernels are compiled for that architecture instead of run."""
    driver.set_active(FakeDriver(arch))
    try:
        with instead(Compiler(arch)) as compiler:
            yield compiler
    finally:
        driver.set_active(None)


def _meta(value):
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, tuple):
        parts = [_meta(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _tensors(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def _read(name: str, arch: int, options: dict, compiled) -> Kernel:
    said, ptx, ir = _ptxas(compiled.asm["ptx"], arch), compiled.asm["ptx"], compiled.asm["ttgir"]
    loop = ir[ir.index("scf.for") :] if "scf.for" in ir else ""

    def number(pattern: str) -> int:
        return int(re.search(pattern, said)[1])

    def most(pattern: str) -> int:
        return max(map(int, re.findall(pattern, loop)), default=0)

    counts = {what: len(re.findall(pattern, ptx)) for what, pattern in INSTRUCTIONS.items()}
    return Kernel(
        name, arch, settings={key: value for key, value in options.items() if not key.startswith("num_")},
        stages=compiled.metadata.num_stages, registers=number(r"Used (\d+) registers"),
        spills=number(r"(\d+) bytes spill stores"), stack=number(r"(\d+) bytes stack frame"),
        shared=compiled.metadata.shared, warps=compiled.metadata.num_warps, serialized="serialized" in said,
        instructions={what: n for what, n in counts.items() if n},
        loads_in_flight=most(r"async_wait.*num = (\d+)"), products_in_flight=most(r"pendings = (\d+)"),
    )


def _ptxas(ptx: str, arch: int) -> str:
    """What the assembler says of a kernel."""
    tool = get_ptxas(arch).path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [tool, "-v", f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}", file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr
