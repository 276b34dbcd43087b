"""What was found on GPUs: which kernel sets passed their tests there, and which of two was the faster, primitive by
primitive. `auto` asks the former alone, and of them the faster first.

`python -m benchmarks.preferences primitives.json` prints the lines of PREFERENCES from what `make gpu` measured.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Preference(NamedTuple):
    """On GPUs of a compute capability, in a storage dtype. why: ratio, device, commit and results file."""

    capability: tuple[int, int]
    dtype: torch.dtype
    primitive: str
    kernel_set: str
    why: str


# Compute capabilities of the GPUs on which the tests of a set's kernels passed; benchmarks/results says when.
PROVEN: dict[str, tuple[tuple[int, int], ...]] = {"triton": ((9, 0),), "cuda": ((9, 0),)}

# Primitives of such a set whose kernels are newer than that, or were rewritten since: `auto` leaves them alone until
# they have passed as they are.
UNPROVEN: dict[str, tuple[str, ...]] = {}

# Where a measurement says other than `dispatch.ORDER`, if both sets are proven. At stage 1 on an H200 `bn_stats` and
# `covariance` of the CUDA set were 1.20 and 1.13 times as fast as Triton's (992c26c, h200.json), which is 18 us of a
# block's 2.8 ms; an operator between Triton's kernels splits their native launch.
PREFERENCES: tuple[Preference, ...] = ()


def proven(kernel_set: str, device: str) -> bool:
    """Whether a set's kernels have passed their tests on such a device as is here; sets for CPUs are tested on any."""
    return kernel_set not in PROVEN or _capability(device) in PROVEN[kernel_set]


def newer(primitive: str) -> bool:
    """Whether no set's kernels for it have passed their tests on a GPU yet."""
    return all(primitive in UNPROVEN.get(name, ()) for name in PROVEN)


def preferred(device: str, dtype: torch.dtype) -> dict[str, str]:
    """The measured set of each primitive that has one."""
    here = _capability(device) if PREFERENCES else None
    return {p.primitive: p.kernel_set for p in PREFERENCES if p.capability == here and p.dtype == dtype}


def _capability(device: str) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability() if device == "cuda" and torch.cuda.is_available() else None
