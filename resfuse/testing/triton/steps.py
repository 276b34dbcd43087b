"""Training steps whose kernels are compiled: the blocks that a launch table is for."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace

import torch

import resfuse

from ...kernels.interface import ACTIVATIONS, Activation, BNContext, Norm
from ...kernels.triton import _table
from ...kernels.triton.bn_act import bn_act
from ...kernels.triton.bn_act_backward import bn_act_backward
from ..cases import CASES, Case, make_block, make_gradient, make_input
from .offline import Compiler, compiled_for

# ResNet-50's bottlenecks, relatives with other operands, and blocks of few channels, some not multiples of 16.
FULL_SIZE = (
    "stage1", "stage2", "stage3", "stage4", "stage1-projection", "stage2-projection", "stage3-projection",
    "stage4-projection", "wide-stage1-projection", "resnext101-64x4d-stage2", "basic-stage1", "preact-stage1",
    "dense-layer", "stem",
)  # fmt: skip
SMALL = ("small-projection", "small-pooled", "small-padded", "ragged", "small-stem", "small-preact")
CHANNELS = (32, 40, 64, 65, 200, 256)  # of activations: each tile, whole and not, and rows of no whole groups
BATCH = 32  # enough rows for the form that large batches take


def compile_steps(
    arch: int, dtype: torch.dtype, names: Iterable[str], tf32: bool = False, batch: int = BATCH, windows: bool = False
) -> Compiler:
    """What the Triton set launches in a training step of each case, compiled for an architecture.

    dtype: float32, or that of autocast; tf32: how torch's convolutions take float32 products; batch: of the cases that
    are not small; windows: convolutions that are not 1x1 by our kernels.
    """
    before, chosen = torch.backends.cudnn.allow_tf32, _table.ours
    torch.backends.cudnn.allow_tf32 = tf32
    _table.ours = lambda *_: windows
    try:
        with compiled_for(arch) as compiler:
            for name in names:
                _step(CASES[name], dtype, batch)
        return compiler
    finally:
        torch.backends.cudnn.allow_tf32, _table.ours = before, chosen


def compile_activations(arch: int, dtype: torch.dtype, channels: Iterable[int] = CHANNELS) -> Compiler:
    """What the Triton set launches for each activation other than ReLU, of batch statistics and of constants."""
    with compiled_for(arch) as compiler:
        for count in channels:
            z, vector = torch.empty(2, 8, 8, count, dtype=dtype).permute(0, 3, 1, 2), torch.empty(count)
            for kind in ACTIVATIONS:
                a = Norm(z, vector, vector, act=Activation(kind, 0.1))
                bn_act(a)
                for batch in (True, False):
                    bn_act_backward(z, a, BNContext(vector, vector, vector, batch))
    return compiler


def _step(case: Case, dtype: torch.dtype, batch: int) -> None:
    if not case.name.startswith("small") and case.batch > 4:
        case = replace(case, batch=batch)
    block = resfuse.fuse(make_block(case), config=resfuse.FuseConfig(backend="triton"))
    x = make_input(case, dtype).requires_grad_()
    context = nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype=dtype)
    with context:
        out = block(x)
    out.backward(make_gradient(case, out.dtype))
