"""How a kernel is started: on the tensors' GPU, or as a test asks (interpreted, or only compiled)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch
from torch import Tensor


class Instead(Protocol):
    """What runs kernels in place of a GPU."""

    arch: int

    def __call__(self, kernel, programs: int, args: tuple, options: dict) -> None: ...


instead: Instead | None = None


def launch(kernel: Callable, programs: int, like: Tensor, *args, **options) -> None:
    """Start `programs` programs of a kernel on like's device; args and options are the kernel's and the compiler's."""
    if instead is not None:
        instead(kernel, programs, args, options)
    elif like.device.index == torch.cuda.current_device():
        kernel[(programs,)](*args, **options)
    else:
        with torch.cuda.device(like.device):
            kernel[(programs,)](*args, **options)


def arch(like: Tensor) -> int:
    """The architecture that the kernel is made for: 80, 86, 89, 90, 100 and so on."""
    return instead.arch if instead is not None else _arch(like.device.index)


@cache
def _arch(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
