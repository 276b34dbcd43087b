"""The Triton kernel set: NVIDIA GPUs of compute capability 8.0 and newer; bfloat16, float16 and float32 storage.

Recipes are computed in registers by the kernels that read them. The vendor's convolutions serve what is not 1x1.
Importing this package loads no Triton; its primitives do.
"""

import importlib.metadata

import torch
from torch import Tensor

from .. import nvidia
from ..interface import PRIMITIVES as PRIMITIVES
from ..interface import Geometry, Reason
from . import _launch

STATUS = "Triton kernels; tested on compute capability 9.0, elsewhere checked without a GPU (interpreted, compiled)"
LEAST_TRITON = (3, 6)  # whose tuples carry the operands


def unsupported(device: str, dtype: torch.dtype) -> list[Reason]:
    """Why this set cannot serve a device type and storage dtype; empty if it can."""
    reasons = nvidia.unsupported(device, dtype, "the Triton kernels", _launch.instead)
    return reasons if _launch.instead is not None else [*reasons, *unavailable()]


def takes_image(x: Tensor, dtype: torch.dtype, weight: Tensor, geometry: Geometry) -> bool:
    """Whether a convolution of an image's few channels, x in dtype, and its weight's gradient are kernels of ours."""
    from . import _few_channels, _table

    return _few_channels.fits(x, weight, geometry) and _table.few_channels(dtype, _launch.arch(x))


def unavailable() -> list[Reason]:
    """Why the installed Triton cannot compile the kernels; empty if it can. Loads no Triton."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return [Reason("triton_missing", "Triton is not installed: pip install triton")]
    if tuple(map(int, version.split(".")[:2])) < LEAST_TRITON:
        least = ".".join(map(str, LEAST_TRITON))
        return [Reason("triton_version", f"the Triton kernels need Triton {least} or newer, this is {version}")]
    return []
