"""CUDA kernels on a CPU: g++ compiles them against csrc/emu, and every memory access that they make is checked.

    library = Library(build([ROOT / "csrc" / "emu" / "microtests.cu"]))
    library.call("warp_ops", [(out, WRITE, "out")], order=2)

What csrc/emu/memory.cpp finds wrong raises EmulatorError. A library's state is global: one launch at a time.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "emu"
READ, WRITE, READWRITE = 0, 1, 2

FOLDERS = [CSRC / folder for folder in ("emu", "cuda/device", "cuda", "")]
INCLUDES = [f"-I{folder}" for folder in FOLDERS]
# No contraction: the same bits as the C++ kernels, and a fused multiply-add only where the source has one.
COMMON = ["-std=c++17", "-O2", "-g1", "-fPIC", "-ffp-contract=off", "-Wall", *INCLUDES]
# The compiler's calls before each access; csrc/emu/memory.cpp answers them in place of a sanitizer's runtime.
CHECKS = [
    "-fsanitize=thread,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
    "--param=tsan-instrument-func-entry-exit=0",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
]  # fmt: skip


class EmulatorError(AssertionError):
    """What a launch did wrong: "kind: what | thread | source line"."""


def unavailable() -> str | None:
    """Why kernels cannot be emulated here, None where they can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the emulator runs on x86-64 Linux, and this is {platform.machine()} {platform.system()}"
    if shutil.which("g++") is None:
        return "the emulator compiles kernels with g++, and there is none on PATH"
    if not (CSRC / "emu").exists():
        return "resfuse was installed without its source folder, which holds the kernels"
    return None


def build(
    kernels: Sequence[Path], bindings: Sequence[Path] = (), flags: Sequence[str] = (), link: Sequence[str] = ()
) -> Path:
    """The shared library of kernels (.cu) and bindings (.cpp), compiled unless one of the same content exists.

    Memory accesses of the kernels are checked, those of the bindings are not. `flags` are for compiling the bindings,
    `link` for linking all.
    """
    runtime = sorted((CSRC / "emu").glob("*.cpp"))
    jobs = [(source, []) for source in runtime]
    jobs += [(Path(source), [*CHECKS, "-xc++"]) for source in kernels]
    jobs += [(Path(source), [*flags]) for source in bindings]
    import fcntl  # which not every system has

    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process that wants the same waits for it, and finds it made
        objects = list(pool.map(lambda job: _object(*job), jobs))
    # The runtime comes first: of a function that it and a kernel instantiate, it must not get the checked copy.
    command = ["-shared", "-Wl,--no-undefined,-Bsymbolic-functions", *map(str, objects), *link, "-ldl"]
    return _cached(f"{Path(kernels[0]).stem}.so", command, objects)


def _object(source: Path, flags: list[str]) -> Path:
    return _cached(f"{source.stem}.o", [*COMMON, *flags, "-c", str(source)], list(_read_by(source)))


def _read_by(source: Path) -> set[Path]:
    """The source and the headers of ours that it includes, directly or not, found as the compiler finds them."""
    found, waiting = set(), [source]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for name in re.findall(r'^\s*#include "([^"]+)"', path.read_text(), re.M):
            places = (folder / name for folder in (path.parent, *FOLDERS))
            waiting += [next(place for place in places if place.exists())]
    return found


def _cached(name: str, command: list[str], inputs: list[Path]) -> Path:
    """What g++ makes of the inputs, kept under a name of their content. Several processes may make it at once."""
    names = {str(path) for path in inputs}
    key = hashlib.sha256("\0".join(part for part in command if part not in names).encode())
    for part in sorted({path.name.encode() + b"\0" + path.read_bytes() for path in inputs}):
        key.update(part + b"\0")  # wherever they lie: a copy of the sources finds what was made of the same
    made = CACHE / f"{key.hexdigest()[:16]}-{name}"
    if not made.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            partial = Path(folder) / name
            done = subprocess.run(["g++", *command, "-o", str(partial)], capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"g++ failed:\n{done.stderr}")
            partial.replace(made)
    return made


class Library:
    """A built library: its `extern "C"` functions, what the emulator counted, and what it found."""

    counts = True  # traffic and instructions

    def __init__(self, path: Path):
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.emu_error.restype = ctypes.c_char_p
        for name in ("emu_stat", "emu_unwritten_bytes", "emu_buffer_traffic"):
            getattr(self._library, name).restype = ctypes.c_uint64

    def call(self, name: str, buffers: Sequence[tuple[Tensor | None, int, str]], *ints, order: int = 0, seed: int = 1):
        """Calls a function of the buffers' addresses, the ints and a stream. Buffers are (tensor, mode, label).

        READ: it may not be written. WRITE: its contents are lost, and all of it must be written. READWRITE: neither.
        A tensor may be None, for a null pointer. `order` is set_order's.
        """
        self.reset()
        self.set_order(order, seed)
        pointers = []
        for tensor, mode, label in buffers:
            pointers.append(ctypes.c_void_p(None if tensor is None else tensor.data_ptr()))
            if tensor is not None:
                size = ctypes.c_uint64(_bytes(tensor, label))
                self._library.emu_register(pointers[-1], size, label.encode(), mode)
        result = getattr(self._library, name)(*pointers, *ints, ctypes.c_void_p(None))
        error = self.error()
        if result or error:
            raise EmulatorError(error or f"{name} returned {result}")
        for (tensor, mode, label), pointer in zip(buffers, pointers, strict=True):
            missed = self._library.emu_unwritten_bytes(pointer) if tensor is not None and mode == WRITE else 0
            if missed:
                raise EmulatorError(f"coverage: {missed} bytes of '{label}' were never written")

    def reset(self):
        """Forgets buffers, counts and the error. A launch without buffers has its global accesses unchecked."""
        self._library.emu_reset()

    def set_order(self, order: int, seed: int = 1):
        """In which order threads and blocks run from now on: 0 forward, 1 backward, 2 random."""
        self._library.emu_set_order(order, ctypes.c_uint64(seed))

    def error(self) -> str | None:
        """What the first failed launch since `reset` did wrong."""
        error = self._library.emu_error()
        return error.decode() if error else None

    def traffic(self, tensor: Tensor, written: bool = False) -> int:
        """Bytes of a buffer that the launches since `reset` read, or wrote; of a byte accessed twice, two."""
        return self._library.emu_buffer_traffic(ctypes.c_void_p(tensor.data_ptr()), int(written))

    def stat(self, name: str) -> int:
        """A count since `reset`: mma, ldmatrix, ldmatrix_cycles, cp_async_bytes, barrier_arrivals,
        shared_read_bytes, shared_written_bytes."""
        count = self._library.emu_stat(name.encode())
        if count == 2**64 - 1:
            raise KeyError(name)
        return count


def _bytes(tensor: Tensor, label: str) -> int:
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    if tensor.numel() and extent != tensor.numel():
        raise ValueError(f"'{label}' has gaps between its elements or shares some")
    return tensor.numel() * tensor.element_size()
