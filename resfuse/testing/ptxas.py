"""What nvcc makes of a CUDA source for a GPU that is not there: registers, shared memory and spills of each kernel."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from .emulator import CSRC

FLAGS = ["-O3", "--fmad=false", "-std=c++17", *(f"-I{CSRC / folder}" for folder in ("", "cuda", "cuda/device"))]
ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    r"(?:[^\n]*?(\d+) bytes smem)?",
    re.S,
)


class Compiled(NamedTuple):
    """A kernel's demangled name, and what it takes; wide: its accesses of 16 bytes; products: its mma.sync."""

    name: str
    registers: int
    shared: int
    spills: int
    wide: int
    products: int


def unavailable() -> str | None:
    """Why nothing can be compiled here, None where it can."""
    return None if shutil.which("nvcc") else "no_nvcc: the CUDA compiler is not on PATH"


def compile_source(source: Path, arch: str) -> list[Compiled]:
    """arch: as nvcc has it, "sm_90a"."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *FLAGS, f"-arch={arch}", "-Xptxas=-v", "-keep", f"-keep-dir={folder}", "-c", str(source)]
        done = subprocess.run([*command, "-o", f"{folder}/x.o"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"nvcc failed:\n{done.stderr}")
        ptx = next(Path(folder).glob("*.ptx")).read_text()
    bodies = {m[1]: m[2] for m in re.finditer(r"\.entry (\w+)\((.*?)\n}", ptx, re.S)}
    found = []
    for name, stores, loads, registers, shared in ENTRY.findall(done.stderr):
        wide = len(re.findall(r"\b(?:ld|st)\.global\S*\.v4|\bcp\.async\.cg", bodies[name]))
        products = len(re.findall(r"\bmma\.sync", bodies[name]))
        spills = int(stores) + int(loads)
        found.append(Compiled(_demangled(name), int(registers), int(shared or 0), spills, wide, products))
    return found


def _demangled(name: str) -> str:
    """kernel<T, true> of void resfuse::cuda::(anonymous namespace)::kernel<T, true>(...)."""
    full = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout
    return re.sub(r"^.*?(\w+(<[^()]*>)?)\(.*$", r"\1", full.replace("(anonymous namespace)::", "").strip())
