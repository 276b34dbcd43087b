"""The CUDA kernel set on CPU tensors: its kernels run by the emulator, or by a GPU on copies.

    with emulated() as library:
        step(block)                     # what the set serves is executed, every access of it checked
    library.traffic(z)                  # bytes of z that the last operator's kernels read
    with on_gpu(): ...                  # the same by the native library's own kernels
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from .. import _native
from ..kernels import dispatch, fakes
from ..kernels.cuda import _ops
from . import emulator


@cache
def load(folder: Path = emulator.CSRC / "cuda") -> emulator.Library:
    """The set built against the emulator, its operators loaded as torch.ops.resfuse_emulated: one a process.

    folder: its sources.
    """
    flags = ["-g0", "-DRESFUSE_EMULATED", *(f"-isystem{path}" for path in include_paths("cpu"))]
    flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    link = [part for path in library_paths("cpu") for part in (f"-L{path}", f"-Wl,-rpath,{path}")]
    libraries = ["-lc10", "-ltorch", "-ltorch_cpu"]
    path = emulator.build(sorted(folder.glob("*.cu")), sorted(folder.glob("*.cpp")), flags, [*link, *libraries])
    torch.ops.load_library(path)
    fakes.register("resfuse_emulated")
    return emulator.Library(path)


@contextmanager
def emulated(order: int = 0, seed: int = 1, library: emulator.Library | None = None) -> Iterator[emulator.Library]:
    """Inside, the CUDA set serves CPU tensors. order, seed: in which order threads and blocks run, as `set_order`'s;
    library: what `load` gave."""
    library = library or load()
    library.set_order(order, seed)
    try:
        with _instead(torch.ops.resfuse_emulated):
            yield library
    finally:
        library.set_order(0)


@contextmanager
def on_gpu() -> Iterator[None]:
    """Inside, the CUDA set serves CPU tensors by a GPU's kernels."""
    with _instead(OnGPU()):
        yield


class OnGPU:
    """The native library's operators, on copies of their operands; what they write is copied back."""

    def __getattr__(self, name: str) -> Callable:
        operator = getattr(_native.load(), name)

        def call(*arguments):
            copies = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
            results = operator(*copies)
            if results is None:  # it writes to operands, and autograd counts each write
                for argument, copy, declared in zip(arguments, copies, operator.default._schema.arguments, strict=True):
                    if argument is not None and declared.is_write:
                        argument.copy_(copy)
                return None
            return results.cpu() if isinstance(results, torch.Tensor) else tuple(t.cpu() for t in results)

        return call


@contextmanager
def _instead(operators) -> Iterator[None]:
    before = _ops.instead
    dispatch.kernels.cache_clear()
    _ops.instead = operators
    try:
        yield
    finally:
        _ops.instead = before
        dispatch.kernels.cache_clear()
