"""Which kernel set was the faster, primitive by primitive, where both ran on a GPU: `auto` asks it first.

`python -m benchmarks.preferences primitives.json` prints the lines from what `make gpu` measured.
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


# Where a measurement says other than `dispatch.ORDER`. None does yet.
PREFERENCES: tuple[Preference, ...] = ()


def preferred(device: str, dtype: torch.dtype) -> dict[str, str]:
    """The measured set of each primitive that has one."""
    if device != "cuda" or not PREFERENCES:
        return {}
    here = torch.cuda.get_device_capability()
    return {p.primitive: p.kernel_set for p in PREFERENCES if p.capability == here and p.dtype == dtype}
