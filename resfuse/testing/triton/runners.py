"""What runs the Triton set's kernels instead of a plain launch on the tensors' GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...kernels import dispatch
from ...kernels.triton import _launch
from .guards import guarded


class OnGPU:
    """Kernels run on a GPU, on copies between margins of what a test holds on the CPU."""

    def __init__(self):
        major, minor = torch.cuda.get_device_capability()
        self.arch = 10 * major + minor
        self.launches: dict[str, int] = {}

    def __call__(self, kernel, programs: int, args: tuple, options: dict) -> None:
        name = kernel.fn.__name__
        self.launches[name] = self.launches.get(name, 0) + 1
        with guarded(args, "cuda", name) as between_margins:
            kernel[(programs,)](*between_margins, **options)


@contextmanager
def instead(runner: _launch.Instead) -> Iterator[_launch.Instead]:
    """Inside, the Triton set serves every device, and its kernels go to the runner."""
    before = _launch.instead
    dispatch.kernels.cache_clear()
    _launch.instead = runner
    try:
        yield runner
    finally:
        _launch.instead = before
        dispatch.kernels.cache_clear()
