"""The arguments of `functional`: what a block is made of, and every check of it, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .kernels.interface import ACTIVATIONS, Activation, Geometry, Window


class ArgumentError(ValueError, TypeError):
    """An argument that the block does not take; the message names it. Nothing has run."""


SERVED = ("cpu", "cuda")
STORAGE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class BN(NamedTuple):
    """A BatchNorm of C channels.

    gamma, beta, running_mean, running_var [C] or None; num_batches_tracked a 0-d integer tensor or None. training: take
    the batch's statistics and, where there are buffers, update them. Without running statistics the batch's are taken
    whatever `training` says. momentum None: cumulative average. group: the processes, more than one, that share batch
    statistics in training, as torch.nn.SyncBatchNorm does; None: this one has its own.
    """

    gamma: Tensor | None = None
    beta: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    eps: float = 1e-5
    momentum: float | None = 0.1
    training: bool = True
    group: dist.ProcessGroup | None = None

    @property
    def batch(self) -> bool:
        """Whether the batch's own statistics normalise."""
        return self.training or (self.running_mean is None and self.running_var is None)


class ConvBN(NamedTuple):
    """A convolution, the BatchNorm after it, and the activation after that.

    weight [K, C/groups, R, S]; bias, gamma, beta, running_mean, running_var [K] or None; act: the activation, where one
    follows, None for ReLU; the rest as in `BN`.
    """

    weight: Tensor
    gamma: Tensor | None = None
    beta: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    bias: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    eps: float = 1e-5
    momentum: float | None = 0.1
    training: bool = True
    group: dist.ProcessGroup | None = None
    act: Activation | None = None

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.stride, self.padding, self.dilation, self.groups)

    @property
    def batch(self) -> bool:
        """Whether the batch's own statistics normalise."""
        return self.training or (self.running_mean is None and self.running_var is None)


class Conv(NamedTuple):
    """A convolution without BatchNorm. weight [K, C/groups, R, S], bias [K] or None."""

    weight: Tensor
    bias: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    batch, group, act = False, None, None  # no BatchNorm

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.stride, self.padding, self.dilation, self.groups)


class Pooled(NamedTuple):
    """A shortcut that averages over `window` and then projects: the "D" variant of ResNet."""

    conv: ConvBN | Conv
    window: Window
    count_include_pad: bool = True


class ZeroPad(NamedTuple):
    """A shortcut without parameters: every stride-th pixel, channels of zeros around ("option A").

    channels: in all; before: of zeros before the input's own.
    """

    channels: int
    before: int = 0
    stride: tuple[int, int] = (1, 1)


class Block(NamedTuple):
    """A residual block of a run: the arguments that `functional.conv_bn_add_relu` takes or, where there is a bn,
    `functional.preactivation`. shortcut: None, or a ConvBN, Conv, Pooled or ZeroPad."""

    convs: tuple[ConvBN | Conv, ...]
    shortcut: ConvBN | Conv | Pooled | ZeroPad | None = None
    relu: bool = True
    scale: float = 1.0
    row_scale: Tensor | None = None
    bn: BN | None = None
    want_stats: bool = False

    @property
    def projects(self) -> bool:
        return isinstance(self.shortcut, (ConvBN, Conv, Pooled))


def autocast_enabled(device: str) -> bool:
    """torch's own asks about no meta device."""
    return device in SERVED and torch.is_autocast_enabled(device)


def storage_dtype(x: Tensor, name: str = "x") -> torch.dtype:
    """The dtype that a block computes in: autocast's for what autocast casts, else x's."""
    check_plain(x, name)
    device = x.device.type
    if autocast_enabled(device) and x.dtype in STORAGE_DTYPES and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def check_plain(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor):
        raise ArgumentError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.device.type not in SERVED:
        raise ArgumentError(f"{name} must be on cpu or cuda, got {x.device}")


def check_image(x: Tensor, name: str = "x") -> None:
    if x.dim() != 4:
        raise ArgumentError(f"{name} must have 4 dimensions [N, C, H, W], got {x.dim()}: {tuple(x.shape)}")
    if x.dtype not in STORAGE_DTYPES:
        raise ArgumentError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if x.numel() == 0:
        raise ArgumentError(f"{name} must not be empty, got {tuple(x.shape)}")


def check_parts(parts: Sequence[Tensor]) -> torch.Size:
    """The shape of tensors side by side."""
    for i, part in enumerate(parts):
        name = "x" if len(parts) == 1 else f"x[{i}]"
        check_image(part, name)
        first = parts[0]
        if (part.shape[0], *part.shape[2:]) != (first.shape[0], *first.shape[2:]):
            raise ArgumentError(f"{name} is {tuple(part.shape)}, x[0] {tuple(first.shape)}: only channels may differ")
        if part.device != first.device or part.dtype != first.dtype:
            raise ArgumentError(f"{name} is {part.dtype} on {part.device}, x[0] {first.dtype} on {first.device}")
    n, _, h, w = parts[0].shape
    return torch.Size((n, sum(part.shape[1] for part in parts), h, w))


def output_shape(shape: torch.Size, c: ConvBN | Conv, name: str) -> torch.Size:
    """Of a convolution of an input of that shape."""
    weight = c.weight
    if weight.dim() != 4:
        raise ArgumentError(f"{name}.weight must be [K, C/groups, R, S], got {tuple(weight.shape)}")
    if weight.shape[1] * c.groups != shape[1] or weight.shape[0] % c.groups:
        raise ArgumentError(
            f"{name}.weight {tuple(weight.shape)} with groups={c.groups} does not fit an input of {shape[1]} channels"
        )
    spatial = c.geometry.spatial(shape[2:], weight.shape[2:])
    if min(spatial) < 1:
        raise ArgumentError(f"{name}: an input of {tuple(shape[2:])} pixels leaves no output ({list(spatial)})")
    return torch.Size((shape[0], weight.shape[0], *spatial))


def pooled_shape(shape: torch.Size, window: Window, name: str) -> torch.Size:
    """Of a pool over an input of that shape, as torch has it."""
    sides = zip(window.size, window.stride, window.padding, window.dilation, strict=True)
    if not all(k > 0 and step > 0 and 0 <= pad <= k // 2 and spread > 0 for k, step, pad, spread in sides):
        raise ArgumentError(f"{name}: {window} is no pooling window; padding is at most half of size")
    spatial = window.spatial(shape[2:])
    if min(spatial) < 1:
        raise ArgumentError(f"{name}: an input of {tuple(shape[2:])} pixels leaves no output ({list(spatial)})")
    return torch.Size((*shape[:2], *spatial))


def check_activations(convs: Sequence[ConvBN | Conv], projection: ConvBN | Conv | None, sums: bool) -> None:
    """sums: whether a shortcut is added to the last convolution's output."""
    named = [(f"conv{i}", c) for i, c in enumerate(convs, 1)] + [("shortcut", projection)]
    for name, c in named:
        act = None if c is None else c.act
        if act is None:
            continue
        if not isinstance(act, Activation) or act.kind not in ACTIVATIONS:
            raise ArgumentError(f"{name}.act must be None or an Activation of {', '.join(ACTIVATIONS)}, got {act!r}")
        if c is projection or (sums and c is convs[-1]):
            raise ArgumentError(f"{name}.act is {act.kind}; a sum follows, and only ReLU or nothing after that")


def check_values_per_channel(c: BN | ConvBN | Conv, shape: torch.Size) -> None:
    """torch's own error for batch statistics of one value."""
    if c.batch and c.group is None and shape[0] * shape[2] * shape[3] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")


def check_tensors(x: Tensor, dtype: torch.dtype, c: BN | ConvBN | Conv, channels: int, name: str) -> None:
    """Device, shape and dtype of a unit's tensors. channels: those of its BatchNorm and bias."""
    autocast = autocast_enabled(x.device.type)
    cast = (dtype,) if dtype == torch.float64 else STORAGE_DTYPES[1:]  # what autocast casts
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for field in ("weight", "bias", "gamma", "beta", "running_mean", "running_var", "num_batches_tracked"):
        t = getattr(c, field, None)
        if t is None:
            continue
        if t.device != x.device:
            raise ArgumentError(f"{name}.{field} is on {t.device}, x on {x.device}; all must be on one device")
        if field == "num_batches_tracked":
            continue
        if field == "weight":
            accepted = cast if autocast else (dtype,)
        else:
            if t.shape != (channels,):
                raise ArgumentError(f"{name}.{field} must be [{channels}], got {tuple(t.shape)}")
            accepted = cast if autocast and field == "bias" else (dtype, wide)
        if t.dtype not in accepted:
            raise ArgumentError(f"{name}.{field} is {t.dtype}; x in {dtype} takes {' or '.join(map(str, accepted))}")
    if not isinstance(c, Conv) and (c.running_mean is None) != (c.running_var is None):
        raise ArgumentError(f"{name}: running_mean and running_var must both be given or both be None")
