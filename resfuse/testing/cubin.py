"""What CUDA code is compiled to, for GPUs that need not be there: registers, memory and instructions of each kernel."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from . import occupancy
from .emulator import CSRC

FLAGS = ["-O3", "--fmad=false", "-std=c++17", *(f"-I{CSRC / folder}" for folder in ("", "cuda", "cuda/device"))]
INSTRUCTIONS = {  # of SASS
    "16 bytes": r"(?:LDG|STG|LDGSTS)\S*\.(?:128|256)\b", "copy": r"LDGSTS\b", "ldmatrix": r"LDSM\b",
    "product": r"HG?MMA\b", "multiply-add": r"FFMA\b", "local": r"(?:LDL|STL)\b",
}  # fmt: skip
BOUND = re.compile(r"^\.nv\.info\.(\w+)\n(?:[^.\n].*\n)*?.*EIATTR_MAX_THREADS\n.*\n\s*Value:\s*(0x\w+)", re.M)


class Kernel(NamedTuple):
    """arch: "sm_90a". shared: bytes of a block, without what a launch adds. stack: bytes of a thread, spills among
    them. threads: the most of a block, None where it names no bound. instructions: INSTRUCTIONS, counted."""

    name: str
    arch: str
    registers: int
    shared: int
    stack: int
    threads: int | None
    instructions: dict[str, int]

    @property
    def blocks(self) -> int | None:
        """That fit on a multiprocessor at once, the shared memory that a launch adds left out."""
        number = int(re.search(r"\d+", self.arch)[0])
        if self.threads is None or number not in occupancy.THREADS:
            return None
        return occupancy.blocks(number, self.registers, self.shared, self.threads)


def reader() -> str | None:
    """NVIDIA's cuobjdump: the toolkit's, or the one that Triton carries."""
    triton = importlib.util.find_spec("triton")
    carried = [Path(triton.origin).with_name("backends") / "nvidia" / "bin" / "cuobjdump"] if triton else []
    return shutil.which("cuobjdump") or next((str(path) for path in carried if path.exists()), None)


def unavailable() -> str | None:
    """Why nothing can be compiled and read here, None where it can."""
    if not CSRC.exists():
        return "no_sources: resfuse was installed without its source folder, which holds the kernels"
    if shutil.which("nvcc") is None:
        return "no_nvcc: the CUDA compiler is not on PATH"
    return None if reader() else "no_cuobjdump: neither the CUDA toolkit nor Triton has it here"


def compile_source(source: Path, arch: str) -> list[Kernel]:
    """The kernels of a .cu file. arch: as nvcc has it, "sm_90a"."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / f"{source.stem}.cubin"
        _run("nvcc", *FLAGS, f"-arch={arch}", "-cubin", "-o", str(binary), str(source))
        return [kernel._replace(arch=arch) for kernel in read(binary)]


def compile_all(arch: str) -> list[Kernel]:
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda source: compile_source(source, arch), sorted((CSRC / "cuda").glob("*.cu")))
        return [kernel for kernels in found for kernel in kernels]


def read(binary: Path) -> list[Kernel]:
    """The kernels of a cubin or a library, each for each architecture that it is compiled for."""
    tool = reader()
    used, code, elf = (_run(tool, option, str(binary)) for option in ("-res-usage", "-sass", "-elf"))
    bounds = dict(BOUND.findall(elf))
    bodies = {(arch, name): body for arch, name, body in _functions(code, r"code for (sm_\w+)", r"Function : (\w+)")}
    # A cubin's resource usage does not name its architecture, and there is one.
    alone = re.search(r"code for (sm_\w+)", code)[1]
    found = []
    for arch, name, text in _functions(used, r"arch = (sm_\w+)", r"Function (\w+):"):
        body = bodies.get((arch or alone, name)) or bodies[(arch or alone).rstrip("af"), name]
        numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", text)}
        counts = {what: len(re.findall(rf"\s{pattern}", body)) for what, pattern in INSTRUCTIONS.items()}
        threads = int(bounds[name], 16) if name in bounds else None
        memory = numbers["REG"], numbers["SHARED"], numbers["STACK"]
        found.append(Kernel(_demangled(name), arch or alone, *memory, threads, counts))
    return found


def _functions(text: str, arch: str, function: str):
    """(architecture, name, text) of each function in what cuobjdump prints."""
    now, places = None, list(re.finditer(f"{arch}|{function}", text))
    for place, following in zip(places, [*places[1:], None], strict=True):
        if place[1]:
            now = place[1]
        else:
            yield now, place[2], text[place.end() : following.start() if following else None]


def _demangled(name: str) -> str:
    """kernel<T, true> of void resfuse::cuda::(anonymous namespace)::kernel<resfuse::cuda::T, true>(...)."""
    full = _run("c++filt", name).replace("(anonymous namespace)::", "").strip()
    return re.sub(r"resfuse::\w+::(outer::)?", "", re.sub(r"^.*?(\w+(<[^()]*>)?)\(.*$", r"\1", full))


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed:\n{done.stderr}")
    return done.stdout
