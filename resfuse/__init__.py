"""Residual blocks for PyTorch that train in about half the activation memory: `resfuse.fuse(model)`."""

import os

from . import blocks
from ._version import __version__
from .arguments import ArgumentError
from .blocks.descriptions import BlockDescription, Part
from .blocks.disabled import disabled
from .blocks.plans import register_block
from .convert import FuseConfig, FuseError, Report, explain, fuse, report, unfuse
from .kernels.interface import Unsupported
from .ranges import from_environment, profile_ranges

__all__ = [
    "ArgumentError", "BasicBlock", "BlockDescription", "Bottleneck", "FuseConfig", "FuseError", "Part", "Report",
    "Unsupported", "__version__", "blocks", "disabled", "explain", "fuse", "profile_ranges", "register_block", "report",
    "unfuse",
]

from_environment(os.environ.get("RESFUSE_NVTX", "0"))


def __getattr__(name: str):
    if name in ("BasicBlock", "Bottleneck"):  # subclasses of torchvision's, which is imported only when asked for
        return getattr(blocks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
