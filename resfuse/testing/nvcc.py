"""CUDA kernels of csrc on a GPU, called as the emulator's `Library` is: hardware confirms what that believes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.cpp_extension import CUDA_HOME

from .emulator import INCLUDES


class Library:
    """Sources compiled by nvcc for the GPU at hand. `extern "C"` functions run on copies of their buffers."""

    counts = False

    def __init__(self, sources: Sequence[Path]):
        major, minor = torch.cuda.get_device_capability()
        arch = f"{major}{minor}" + ("a" if major >= 9 else "")
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "library.so"
            subprocess.run(
                [
                    os.path.join(CUDA_HOME or "/usr/local/cuda", "bin", "nvcc"), "-std=c++17", "-O2", "-shared",
                    "-Xcompiler=-fPIC", f"-gencode=arch=compute_{arch},code=sm_{arch}", *INCLUDES,
                    *map(str, sources), "-o", str(made),
                ],
                check=True,
            )  # fmt: skip
            self._library = ctypes.CDLL(str(made))

    def call(self, name: str, buffers: Sequence[tuple[Tensor | None, int, str]], *ints, order: int = 0, seed: int = 1):
        """As the emulator's. The hardware has its own order."""
        copies = [None if tensor is None else tensor.cuda() for tensor, _, _ in buffers]
        pointers = [ctypes.c_void_p(None if copy is None else copy.data_ptr()) for copy in copies]
        torch.cuda.synchronize()
        result = getattr(self._library, name)(*pointers, *ints, ctypes.c_void_p(None))
        if result:
            raise RuntimeError(f"{name} returned {result}")
        torch.cuda.synchronize()
        for (tensor, _, _), copy in zip(buffers, copies, strict=True):
            if tensor is not None:
                tensor.copy_(copy)
