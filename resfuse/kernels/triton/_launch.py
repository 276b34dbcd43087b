"""How a kernel is started: on the tensors' GPU, or as a test asks (interpreted, or only compiled)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Protocol

import torch
import triton
from torch import Tensor

from ... import _native
from ..interface import STREAM, Native, Started, listening

# Whether this Triton's compiled kernels are run with the arguments that `_started` gives, as was seen on a GPU, and
# have the parameters that `parameters` gives, as is read in its launchers' source (`tests/test_launch_parameters.py`).
RUNS_COMPILED = triton.__version__.startswith("3.6.")
# How a parameter lies in memory, by its type in a signature.
STORED = {
    "i1": ctypes.c_int8, "i8": ctypes.c_int8, "i16": ctypes.c_int16, "i32": ctypes.c_int32, "i64": ctypes.c_int64,
    "u1": ctypes.c_uint8, "u8": ctypes.c_uint8, "u16": ctypes.c_uint16, "u32": ctypes.c_uint32, "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float, "fp64": ctypes.c_double,
}  # fmt: skip
NULL = bytes(8)


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
    return Started(compiled.run, fixed, operands, True, _described(compiled, programs, like.device.index, operands))


def _described(compiled, programs: int, device: int, operands: tuple) -> Native | None:
    """None where a launch takes more than a grid, a block and parameters."""
    made, is_, module = parameters(compiled, operands), compiled.metadata, _native.module()
    more = is_.num_ctas != 1 or is_.launch_cooperative_grid or is_.launch_pdl
    if module is None or made is None or more or programs == 0:
        return None
    launch = compiled, compiled.name, compiled.function, (programs, 1, 1), 32 * is_.num_warps, is_.shared
    return Native(partial(module.Batch, device), launch, made)


def parameters(compiled, operands: Iterable) -> tuple[bytes | Tensor, ...] | None:
    """What the kernel's launcher hands to the driver: the operands, in order, tuples one part after the other, without
    what the kernel was compiled for (a constexpr, None, 1), and two scratch memories. None where it is more than that.
    """
    if compiled.metadata.global_scratch_size or compiled.metadata.profile_scratch_size:
        return None
    made = []
    for kind, value in _flat(tuple(compiled.src.signature.values()), operands):
        if kind.startswith("*"):
            made.append(value)
        elif kind in STORED:
            made.append(bytes(STORED[kind](value)))
        elif kind != "constexpr":  # a tensor's descriptor
            return None
    return (*made, NULL, NULL)


def _flat(kind, value) -> Iterator[tuple[str, object]]:
    """Types of a signature with their values."""
    if isinstance(kind, tuple):
        for each in zip(kind, value, strict=True):
            yield from _flat(*each)
    else:
        yield kind, value


def arch(like: Tensor) -> int:
    """The architecture that the kernel is made for: 80, 86, 89, 90, 100 and so on."""
    return instead.arch if instead is not None else _arch(like.device.index)


@cache
def _arch(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
