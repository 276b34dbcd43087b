"""Shapes of blocks, and eager blocks and inputs made from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..blocks import modules


@dataclass(frozen=True)
class BottleneckCase:
    """One bottleneck: `in_channels` -> 1x1 -> `width` -> 3x3 -> `width` -> 1x1 -> `out_channels`.

    The input is [batch, in_channels, height, breadth], breadth None meaning a square. The shortcut is a projection
    where stride or channels ask for one. `stride_first` puts the stride on the first 1x1 (the v1 form), `bias` gives
    the convolutions one. out_channels is a multiple of 4, torchvision's expansion.
    """

    name: str
    in_channels: int
    width: int
    out_channels: int
    height: int
    stride: int = 1
    groups: int = 1
    dilation: int = 1
    batch: int = 8
    breadth: int | None = None
    stride_first: bool = False
    bias: bool = False

    @property
    def projection(self) -> bool:
        return self.stride != 1 or self.in_channels != self.out_channels

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.in_channels, self.height, self.breadth or self.height

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        rows, columns = (-(-size // self.stride) for size in self.input_shape[2:])
        return self.batch, self.out_channels, rows, columns

    @property
    def rows(self) -> int:
        """M, the rows of the output read as a matrix."""
        n, _, p, q = self.output_shape
        return n * p * q

    def unit_bytes(self, itemsize: int) -> int:
        """Bytes of one width-channel tensor at the output's resolution: the unit that saved memory is quoted in."""
        return self.rows * self.width * itemsize

    def build(self) -> nn.Module:
        """torchvision's Bottleneck."""
        from torchvision.models.resnet import Bottleneck

        planes = self.out_channels // Bottleneck.expansion
        # Bottleneck truncates planes * base_width / 64; the small surplus keeps it from losing one to rounding.
        base_width = 64 * (self.width // self.groups) / planes + 1e-6
        shortcut = None
        if self.projection:
            shortcut = nn.Sequential(
                nn.Conv2d(self.in_channels, self.out_channels, 1, self.stride, bias=False),
                nn.BatchNorm2d(self.out_channels),
            )
        block = Bottleneck(self.in_channels, planes, self.stride, shortcut, self.groups, base_width, self.dilation)
        if self.stride_first:
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
        for module in block.modules():
            if isinstance(module, nn.Conv2d) and self.bias:
                module.bias = nn.Parameter(torch.randn(module.out_channels))
        return block

    @property
    def before_sum(self) -> tuple[str, ...]:
        """The BatchNorms whose output goes into a rectified sum."""
        return ("bn3",)


@dataclass(frozen=True)
class ModuleCase:
    """Any other block: a function that makes it, its input [batch, in_channels, height, breadth or height], and the
    channels of the unit that its saved memory is quoted in, with the rows of its output."""

    name: str
    build: Callable[[], nn.Module]
    in_channels: int
    width: int
    height: int
    batch: int = 8
    breadth: int | None = None
    before_sum: tuple[str, ...] = ()

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.in_channels, self.height, self.breadth or self.height

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        with torch.device("meta"):
            return tuple(self.build()(torch.empty(self.input_shape)).shape)

    @property
    def rows(self) -> int:
        n, _, p, q = self.output_shape
        return n * p * q

    def unit_bytes(self, itemsize: int) -> int:
        return self.rows * self.width * itemsize


Case = BottleneckCase | ModuleCase


def basic(in_planes: int, planes: int, stride: int = 1) -> nn.Module:
    """torchvision's BasicBlock, with a projection where it needs one."""
    from torchvision.models.resnet import BasicBlock

    shortcut = None
    if stride != 1 or in_planes != planes:
        shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
    return BasicBlock(in_planes, planes, stride, shortcut)


def dense_layer(channels: int, growth: int, size: int = 4) -> nn.Module:
    """torchvision's DenseNet layer."""
    from torchvision.models.densenet import _DenseLayer

    return _DenseLayer(channels, growth, size, 0.0)


STAGES = (
    BottleneckCase("stage1", 256, 64, 256, 56),
    BottleneckCase("stage2", 512, 128, 512, 28),
    BottleneckCase("stage3", 1024, 256, 1024, 14),
    BottleneckCase("stage4", 2048, 512, 2048, 7),
)
PROJECTIONS = (
    BottleneckCase("stage1-projection", 64, 64, 256, 56),
    BottleneckCase("stage2-projection", 256, 128, 512, 56, stride=2),
    BottleneckCase("stage3-projection", 512, 256, 1024, 28, stride=2),
    BottleneckCase("stage4-projection", 1024, 512, 2048, 14, stride=2),
)
RELATIVES = (
    BottleneckCase("resnext50-stage1", 256, 128, 256, 56, groups=32),
    BottleneckCase("resnext101-64x4d-stage2", 512, 512, 512, 28, groups=64),
    BottleneckCase("wide-stage2", 512, 256, 512, 28),
    BottleneckCase("wide-stage1-projection", 64, 128, 256, 56),
    BottleneckCase("wide-stage3-projection", 512, 512, 1024, 28, stride=2),
)
SMALL = (
    BottleneckCase("small-identity", 32, 8, 32, 8, batch=4),
    BottleneckCase("small-projection", 16, 8, 32, 8, batch=4),
    BottleneckCase("small-strided", 16, 8, 32, 9, stride=2, batch=4),
    BottleneckCase("small-v1-stride", 16, 8, 32, 8, stride=2, batch=4, stride_first=True),
    BottleneckCase("small-groups", 32, 16, 32, 6, groups=4, batch=4),
    BottleneckCase("small-dilated", 32, 8, 32, 9, dilation=2, batch=4),
    BottleneckCase("small-bias", 16, 8, 32, 6, stride=2, batch=4, bias=True),
    BottleneckCase("ragged", 20, 5, 20, 7, batch=3, breadth=5),
    BottleneckCase("odd-projection", 13, 7, 28, 5, stride=2, batch=3, breadth=9),
    BottleneckCase("wide-inside", 12, 20, 12, 6, batch=2),
    BottleneckCase("one-pixel", 16, 4, 16, 1, batch=5),
    BottleneckCase("two-values", 4, 1, 4, 1, batch=2),
)
# The rest of the family at the shapes of ResNet-18, pre-activation ResNets, DenseNet-121 and the stem.
FAMILY = (
    *(ModuleCase(f"basic-stage{i}", partial(basic, c, c), c, c, h, before_sum=("bn2",))
      for i, (c, h) in enumerate(((64, 56), (128, 28), (256, 14), (512, 7)), 1)),
    ModuleCase("basic-stage2-projection", partial(basic, 64, 128, 2), 64, 128, 56, before_sum=("bn2",)),
    ModuleCase("preact-stage1", partial(modules.PreActBottleneck, 256, 64), 256, 64, 56),
    ModuleCase("preact-stage3", partial(modules.PreActBottleneck, 1024, 256), 1024, 256, 14),
    ModuleCase("preact-basic-stage2", partial(modules.PreActBlock, 128, 128), 128, 128, 28),
    ModuleCase("dense-layer", partial(dense_layer, 256, 32), 256, 32, 28),
    ModuleCase("stem", partial(modules.Stem, 3, 64), 3, 64, 224),
    ModuleCase("inverted-expansion", partial(modules.ConvBNReLU, 32, 192, 1), 32, 192, 28),
)
_SUM = ("bn2",)
SMALL_FAMILY = (
    ModuleCase("small-basic", partial(basic, 8, 8), 8, 8, 8, 4, before_sum=_SUM),
    ModuleCase("small-basic-strided", partial(basic, 8, 13, 2), 8, 13, 9, 4, 7, _SUM),
    ModuleCase("small-pooled", partial(modules.ResidualBlock, 8, 12, 2, shortcut="pooled"), 8, 12, 9, 4, 6, _SUM),
    ModuleCase("small-padded", partial(modules.ResidualBlock, 8, 13, 2, shortcut="padded"), 8, 13, 8, 4, 6, _SUM),
    ModuleCase("small-scaled", partial(modules.ResidualBlock, 8, 8, scale=0.7), 8, 8, 8, 4, 6, _SUM),
    ModuleCase("small-linear-sum", partial(modules.ResidualBlock, 16, 16, width=5, relu=False), 16, 5, 8, 4),
    ModuleCase("small-plain", partial(modules.ResidualBlock, 8, 12, shortcut="none"), 8, 12, 8, 4, 6),
    ModuleCase("small-preact", partial(modules.PreActBlock, 8, 12, 2), 8, 12, 9, 4, 7),
    ModuleCase("small-preact-bottleneck", partial(modules.PreActBottleneck, 16, 4), 16, 4, 8, 4, 5),
    ModuleCase("small-dense-layer", partial(dense_layer, 12, 5), 12, 5, 8, 4, 5),
    ModuleCase("small-stem", partial(modules.Stem, 3, 7), 3, 7, 21, 4, 18),
    ModuleCase("small-expansion", partial(modules.ConvBNReLU, 6, 20, 1), 6, 20, 8, 4, 5),
    ModuleCase("small-depthwise", partial(modules.ConvBNReLU, 9, 9, 3, groups=9), 9, 9, 8, 4, 5),
)
CASES = {case.name: case for case in (*STAGES, *PROJECTIONS, *RELATIVES, *FAMILY, *SMALL, *SMALL_FAMILY)}


def make_block(
    case: Case,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
    device: torch.device | str = "cpu",
    kinks: bool = True,
) -> nn.Module:
    """The eager block in training mode, with random BatchNorm parameters (some gammas negative) and running statistics.

    kinks False: betas so large that each ReLU passes or blocks a whole channel; no rounding flips one, so errors are
    rounding alone and vary little from seed to seed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block = case.build()
        for name, module in block.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                _randomise(module)
                if not kinks and "downsample" not in name and "shortcut" not in name:
                    _without_kinks(module, 16.0 if name in case.before_sum else 8.0)
    return block.to(device=device, dtype=dtype, memory_format=memory_format)


def make_input(
    case: Case,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """[N, C, H, W] as a block sees it: rectified, each channel with a mean and spread of its own."""
    generator = torch.Generator().manual_seed(seed)
    channels = (1, case.in_channels, 1, 1)
    x = torch.randn(case.input_shape, generator=generator)
    x = x * (0.5 + torch.rand(channels, generator=generator)) + 0.5 * torch.randn(channels, generator=generator)
    return x.relu().to(device=device, dtype=dtype, memory_format=memory_format)


def make_gradient(
    case: Case,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A standard normal gradient of the block's output, drawn apart from `make_input` of the same seed."""
    dout = torch.randn(case.output_shape, generator=torch.Generator().manual_seed(seed + 2**20))
    return dout.to(device=device, dtype=dtype, memory_format=memory_format)


def _randomise(bn: nn.BatchNorm2d) -> None:
    with torch.no_grad():
        bn.weight.normal_(1.0, 0.4)
        bn.bias.normal_(0.0, 0.3)
        bn.running_mean.normal_(0.0, 0.2)
        bn.running_var.uniform_(0.5, 1.5)


def _without_kinks(bn: nn.BatchNorm2d, distance: float) -> None:
    """Put each channel's values `distance` or so from zero, half of the channels on either side."""
    with torch.no_grad():
        bn.weight.uniform_(0.5, 1.0)
        blocked = torch.randperm(bn.num_features) < bn.num_features // 2
        bn.bias.copy_(torch.where(blocked, -distance, distance))
