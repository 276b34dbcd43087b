"""Other ways to a faster or smaller training step, to be measured beside resfuse: what each is, and why it is not here
where it is not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

from ..blocks import resnet
from ..blocks.mixin import original_name
from ..kernels.interface import Reason
from ..testing.comparison import Mode
from ..testing.roofline.recording import block_names
from .implementations import AUTOTUNE, COMPILE, EAGER, EAGER_NCHW, RESFUSE, Implementation

BUDGET = 0.5  # of the activations that a compiled step would keep


@dataclass(frozen=True)
class Alternative:
    """absent(device, mode): why it cannot run there, None where it can."""

    implementation: Implementation
    absent: Callable[[torch.device, Mode], Reason | None] = lambda device, mode: None

    @property
    def name(self) -> str:
        return self.implementation.name


def checkpointed(model: nn.Module) -> nn.Module:
    """Every block that resfuse would fuse keeps its input alone, and runs again in backward. Running statistics move
    twice a step."""
    blocks = [model.get_submodule(name) for name in block_names(model)]
    if not blocks:
        return checkpoint_wrapper(model)
    apply_activation_checkpointing(model, check_fn=lambda module: any(module is block for block in blocks))
    return model


class RecomputedConvBN(nn.Module):
    """A BatchNorm behind its convolution, whose output is not kept but made again in backward, as in PyTorch's tutorial
    on fusing the two by a custom Function."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d):
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: self.norm(self.conv(x)), x, use_reentrant=False)


def recomputed(model: nn.Module) -> nn.Module:
    """Every convolution that a BatchNorm follows in its module's list of children, and that BatchNorm, as one."""
    for module in list(model.modules()):
        children = list(module.named_children())
        for (first, conv), (second, norm) in zip(children, children[1:], strict=False):
            pair = type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d
            if pair and conv.out_channels == norm.num_features:
                setattr(module, first, RecomputedConvBN(conv, norm))
                setattr(module, second, nn.Identity())
    return model


class Budgeted(nn.Module):
    """torch.compile with a share of the activations to keep; what is beyond is computed again in backward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.compiled = torch.compile(model)

    def forward(self, x: Tensor) -> Tensor:
        from torch._functorch import config

        with config.patch(activation_memory_budget=BUDGET):  # read while it compiles
            return self.compiled(x)


def in_place_abn(model: nn.Module) -> nn.Module:
    """inplace_abn in torchvision's ResNets, in the place of a BatchNorm and the ReLU behind it: of both the output is
    kept, from which backward makes the input again. LeakyReLU, since ReLU has no inverse: another model. The last
    BatchNorm of a block, with a sum behind it, stays."""
    from inplace_abn import InPlaceABN

    def abn(norm: nn.BatchNorm2d) -> nn.Module:
        own = InPlaceABN(norm.num_features, norm.eps, norm.momentum, activation="leaky_relu")
        own.load_state_dict(norm.state_dict(), strict=False)
        return own.to(norm.weight.device)

    blocks = [m for m in model.modules() if original_name(m) in resnet.ORIGINALS]
    if not blocks:
        raise NotImplementedError("it is for torchvision's ResNets and their blocks")
    for block in blocks:
        block.bn1 = abn(block.bn1)
        if hasattr(block, "conv3"):
            block.bn2 = abn(block.bn2)
        block.forward = partial(_in_place_forward, block)
    if type(getattr(model, "relu", None)) is nn.ReLU and model not in blocks:
        model.bn1, model.relu = abn(model.bn1), nn.Identity()
    return model


def _in_place_forward(block: nn.Module, x: Tensor) -> Tensor:
    y = block.bn2(block.conv2(block.bn1(block.conv1(x))))
    if hasattr(block, "conv3"):
        y = block.bn3(block.conv3(y))
    return block.relu(y + (x if block.downsample is None else block.downsample(x)))


def _no_in_place(device: torch.device, mode: Mode) -> Reason | None:
    if importlib.util.find_spec("inplace_abn") is None:
        return Reason("package_missing", "inplace_abn is not installed")
    if mode.compute is torch.bfloat16 or (mode.compute is torch.float16 and device.type != "cuda"):
        return Reason("dtype", f"inplace_abn has no {str(mode.compute).removeprefix('torch.')} there")
    return None


def _search_is_long(device: torch.device, mode: Mode) -> Reason | None:
    return None if device.type == "cuda" else Reason("gpu_only", "its search is over a GPU's kernels")


def _not_wired(module: str, package: str, lacks: str) -> Callable[[torch.device, Mode], Reason]:
    """Of what has no code here, since there was nothing to try it on."""

    def absent(device: torch.device, mode: Mode) -> Reason:
        if importlib.util.find_spec(module) is None:
            return Reason("package_missing", f"{package} is not installed; {lacks}")
        return Reason("not_wired", f"{package} is installed, but nothing here calls it; {lacks}")

    return absent


def _refused(model: nn.Module) -> nn.Module:
    raise NotImplementedError("no code for it; `absent` says why")


ALTERNATIVES = (
    Alternative(EAGER),
    Alternative(EAGER_NCHW),
    Alternative(RESFUSE),
    Alternative(Implementation("checkpointed blocks", checkpointed)),
    Alternative(Implementation("conv-BN recomputed", recomputed)),
    Alternative(COMPILE),
    Alternative(Implementation(f"torch.compile, budget {BUDGET}", Budgeted, compiled=True)),
    Alternative(AUTOTUNE, _search_is_long),
    Alternative(
        Implementation("cuDNN frontend", _refused),
        _not_wired("cudnn", "nvidia-cudnn-frontend", "BN+add+ReLU and conv+statistics in fp16 NHWC on a GPU"),
    ),
    Alternative(Implementation("inplace_abn", in_place_abn), _no_in_place),
    Alternative(
        Implementation("apex groupbn", _refused),
        _not_wired("apex", "apex", "its contrib.groupbn is for fp16 NHWC on a GPU, convolutions unfused"),
    ),
)
