"""Residual blocks for PyTorch that train in about half the activation memory: `resfuse.fuse(model)`."""

from ._version import __version__
from .arguments import ArgumentError
from .blocks.mixin import disabled
from .convert import FuseConfig, FuseError, Report, explain, fuse, report, unfuse
from .kernels.interface import Unsupported

__all__ = [
    "ArgumentError", "BasicBlock", "Bottleneck", "FuseConfig", "FuseError", "Report", "Unsupported", "__version__",
    "disabled", "explain", "fuse", "report", "unfuse",
]


def __getattr__(name: str):
    # Subclasses of torchvision's, which is imported only when they are asked for.
    if name == "Bottleneck":
        from .blocks.bottleneck import Bottleneck

        return Bottleneck
    if name == "BasicBlock":
        from .blocks.basic_block import BasicBlock

        return BasicBlock
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
