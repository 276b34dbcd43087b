"""Blocks of our own in plain torch operations: what they are, and what runs where the fused forward cannot.

`resfuse.blocks` has them fused, under the same names.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHORTCUTS = ("identity", "projection", "pooled", "padded", "none")


class ConvBNReLU(nn.Module):
    """Convolution, BatchNorm, ReLU (relu False: none) of a tensor or of several side by side.

    Arguments as of `torchvision.ops.Conv2dNormActivation`; padding None keeps the size at stride 1.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, padding: int | None = None,
        groups: int = 1, dilation: int = 1, bias: bool = False, relu: bool = True,
    ):
        super().__init__()
        padding = (kernel_size - 1) // 2 * dilation if padding is None else padding
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = relu

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        out = self.bn(self.conv(x if isinstance(x, Tensor) else torch.cat(list(x), 1)))
        return F.relu(out) if self.relu else out


class Chain(nn.Sequential):
    """ConvBNReLUs in a row, the first of a tensor or of several side by side: fused, nothing but the raw outputs of the
    convolutions is kept between them."""

    def __init__(self, *layers: ConvBNReLU):
        for layer in layers:
            if not isinstance(layer, ConvBNReLU):
                raise TypeError(f"a Chain is of ConvBNReLU, got {type(layer).__name__}")
        super().__init__(*layers)


class BNReLU(nn.Module):
    """BatchNorm and ReLU: the end of a pre-activation network."""

    def __init__(self, num_features: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(num_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(x))


class Stem(nn.Module):
    """A ResNet's first layers: 7x7 convolution of stride 2, BatchNorm, ReLU, 3x3 max pool of stride 2."""

    def __init__(self, in_channels: int = 3, out_channels: int = 64):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 7, 2, 3, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.maxpool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool(F.relu(self.bn(self.conv(x))))


class ResidualBlock(nn.Module):
    """A basic block (two 3x3) or, with a width, a bottleneck (1x1, 3x3 of that width, 1x1).

    stride: of the first 3x3. preactivation: BatchNorm and ReLU before each convolution, none after the sum. shortcut:
    "identity"; "projection", a 1x1; "pooled", a 1x1 of averages; "padded", channels of zeros; "none", a plain network's
    layers; None: the identity where shapes allow, else a projection. Projections have a BatchNorm in post-activation
    blocks and read the pre-activated input in the others.

    The sum is `scale * (row_scale * main + shortcut)`: drop_path is the share of samples whose main branch is left out
    in training (the others' is divided by what remains). gated: `gate * main + (1 - gate) * shortcut` with `gate =
    sigmoid(gate(x))`, a 1x1 whose bias begins at -1 (highway). relu False: no activation after the sum.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, *, width: int | None = None, groups: int = 1,
        preactivation: bool = False, shortcut: str | None = None, drop_path: float = 0.0, scale: float = 1.0,
        gated: bool = False, relu: bool = True,
    ):
        super().__init__()
        same = stride == 1 and in_channels == out_channels
        shortcut = shortcut or ("identity" if same else "projection")
        if shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut={shortcut!r} is not one of {', '.join(SHORTCUTS)}")
        if shortcut == "identity" and not same:
            raise ValueError(
                f"an identity needs stride 1 and equal channels, got stride {stride}, {in_channels} and {out_channels}"
            )
        if gated and (not same or shortcut == "none"):
            raise ValueError("gated needs a shortcut, stride 1 and equal channels")
        if width is None:
            shapes = [(in_channels, out_channels, 3, stride), (out_channels, out_channels, 3, 1)]
        else:
            shapes = [(in_channels, width, 1, 1), (width, width, 3, stride), (width, out_channels, 1, 1)]
        for i, (in_, out, kernel, step) in enumerate(shapes, 1):
            grouped = groups if width is not None and kernel == 3 else 1
            conv = nn.Conv2d(in_, out, kernel, step, kernel // 2, groups=grouped, bias=False)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(in_ if preactivation else out))
        self.depth = len(shapes)
        self.stride, self.preactivation, self.kind = stride, preactivation, shortcut
        self.drop_path, self.scale, self.relu = drop_path, scale, relu and not preactivation
        self.padding = (out_channels - in_channels) // 2, out_channels
        if shortcut in ("projection", "pooled"):
            step = 1 if shortcut == "pooled" else stride
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, step, bias=False)
            if not preactivation:
                self.shortcut_bn = nn.BatchNorm2d(out_channels)
        if gated:
            self.gate = nn.Conv2d(in_channels, out_channels, 1)
            nn.init.constant_(self.gate.bias, -1.0)

    def forward(self, x: Tensor) -> Tensor:
        y = first = F.relu(self.bn1(x)) if self.preactivation else x
        for i in range(1, self.depth + 1):
            conv, bn = self.get_submodule(f"conv{i}"), self.get_submodule(f"bn{i}")
            if self.preactivation:
                y = conv(y if i == 1 else F.relu(bn(y)))
            else:
                y = bn(conv(y if i == 1 else F.relu(y)))
        return self._sum(x, first, y)

    def _sum(self, x: Tensor, first: Tensor, main: Tensor) -> Tensor:
        row_scale, gate = self.row_scale(x), self.gate_of(x)
        if row_scale is not None:
            main = main * row_scale.to(main.dtype)[:, None, None, None]
        if self.kind != "none":
            residual = self._residual(x, first).to(main.dtype)  # as the sum in place of other blocks has it
            main = main + residual if gate is None else gate * main + (1 - gate) * residual
            main = main if self.scale == 1 else main * self.scale
        return F.relu(main) if self.relu else main

    def _residual(self, x: Tensor, first: Tensor) -> Tensor:
        if self.kind == "identity":
            return x
        if self.kind == "padded":
            before, channels = self.padding
            step = self.stride
            return F.pad(x[:, :, ::step, ::step], (0, 0, 0, 0, before, channels - before - x.shape[1]))
        if self.kind == "pooled" and self.stride > 1:
            first = F.avg_pool2d(first, self.stride, self.stride, ceil_mode=True, count_include_pad=False)
        z = self.shortcut(first)
        return z if self.preactivation else self.shortcut_bn(z)

    def row_scale(self, x: Tensor) -> Tensor | None:
        """[N] factors of the main branch, drawn for this call; None where nothing is left out."""
        if not self.training or self.drop_path == 0 or self.kind == "none":
            return None
        keep = 1 - self.drop_path
        return torch.full((len(x),), keep, device=x.device).bernoulli_() / keep

    def gate_of(self, x: Tensor) -> Tensor | None:
        return torch.sigmoid(self.gate(x)) if "gate" in self._modules else None


class PreActBlock(ResidualBlock):
    """Two pre-activated 3x3 convolutions."""

    def __init__(self, in_planes: int, planes: int, stride: int = 1, **options):
        super().__init__(in_planes, planes, stride, preactivation=True, **options)


class PreActBottleneck(ResidualBlock):
    """Pre-activated 1x1, 3x3, 1x1; four times as many channels come out as the 3x3 has."""

    expansion = 4

    def __init__(self, in_planes: int, planes: int, stride: int = 1, **options):
        super().__init__(
            in_planes, self.expansion * planes, stride, width=planes, preactivation=True, **options
        )
