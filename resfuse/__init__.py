"""Residual blocks for PyTorch that train in about half the activation memory: `resfuse.fuse(model)`."""

from ._version import __version__
from .blocks.mixin import disabled
from .convert import FuseConfig, FuseError, Report, explain, fuse, report, unfuse
from .functional import ArgumentError
from .kernels.interface import Unsupported

__all__ = [
    "ArgumentError", "Bottleneck", "FuseConfig", "FuseError", "Report", "Unsupported", "__version__", "disabled",
    "explain", "fuse", "report", "unfuse",
]


def __getattr__(name: str):
    if name == "Bottleneck":  # a subclass of torchvision's, which is imported only when asked for
        from .blocks.bottleneck import Bottleneck

        return Bottleneck
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
