"""How a kernel is started: on the tensors' GPU, or as a test asks (interpreted, or only compiled)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch
import triton
from torch import Tensor

from ..interface import STREAM, Started, listening

# Whether this Triton's compiled kernels are run with the arguments that `_started` gives, as was seen on a GPU.
RUNS_COMPILED = triton.__version__.startswith("3.6.")


class Instead(Protocol):
    """What runs kernels in place of a GPU."""

    arch: int

    def __call__(self, kernel, programs: int, args: tuple, options: dict) -> None: ...


instead: Instead | None = None


def launch(kernel: Callable, programs: int, like: Tensor, *args, **options) -> None:
    """Start `programs` programs of a kernel on like's device; args and options are the kernel's and the compiler's."""
    if listening.started is not None:
        listening.started(lambda: _started(kernel, programs, like, args, options))
    else:
        _start(kernel, programs, like, args, options)


def _start(kernel: Callable, programs: int, like: Tensor, args: tuple, options: dict):
    """The compiled kernel, where one ran."""
    if instead is not None:
        return instead(kernel, programs, args, options)
    if like.device.index == torch._C._cuda_getDevice():
        return kernel[(programs,)](*args, **options)
    with torch.cuda.device(like.device):
        return kernel[(programs,)](*args, **options)


def _started(kernel: Callable, programs: int, like: Tensor, args: tuple, options: dict) -> Started:
    """Starts it, and says how: by the compiled kernel itself, without what Triton does to find it."""
    compiled = _start(kernel, programs, like, args, options)
    if instead is not None or not RUNS_COMPILED:
        again = lambda like, *args: _start(kernel, programs, like, args, options)  # noqa: E731
        return Started(again, (), (like, *args), False)
    fixed = (programs, 1, 1, STREAM, compiled.function, compiled.packed_metadata, None, None, None)
    operands = (*args, *(options[name] for name in kernel.arg_names[len(args) :]))
    return Started(compiled.run, fixed, operands, True)


def arch(like: Tensor) -> int:
    """The architecture that the kernel is made for: 80, 86, 89, 90, 100 and so on."""
    return instead.arch if instead is not None else _arch(like.device.index)


@cache
def _arch(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
