"""Our BNReLU and Stem, fused: the normalised activation is not kept."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional
from ..kernels.interface import Reason
from . import _stats, modules, stem
from ._pool import pool_refusal, window
from .mixin import export, norm_refusal, read_norm

ORIGINALS = ("resfuse.blocks.modules.BNReLU", "resfuse.blocks.modules.Stem")
LISTS = False
OWNS = None


def refusal(block: modules.BNReLU | modules.Stem) -> Reason | None:
    reason = norm_refusal("bn", block.bn)
    return reason if reason or not _pools(block) else pool_refusal("maxpool", block.maxpool)


def run(block: modules.BNReLU | modules.Stem, x: Tensor, backend: str) -> Tensor:
    if _pools(block):
        return stem.convolved(x, block, block.conv, block.bn, window(block.maxpool), backend)
    return functional.bn_relu(x, read_norm(block.bn), stats=_stats.take(x), backend=backend)


def stem_ends(block: modules.BNReLU | modules.Stem) -> tuple[str, str] | None:
    """As in `stem.py`; None without a convolution."""
    return ("conv", "maxpool") if _pools(block) else None


def forms(block: modules.BNReLU | modules.Stem) -> str:
    return "bn and relu in one, with maxpool by 8-bit places" if _pools(block) else "bn and relu in one"


def _pools(block: nn.Module) -> bool:
    return "maxpool" in block._modules


def __getattr__(name: str) -> type[nn.Module]:
    return export(name, __name__, ORIGINALS)
