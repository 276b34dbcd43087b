"""A bottleneck ResNet small enough to train in seconds."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SmallResNet(nn.Module):
    """3x3 stem, then stages of torchvision's Bottleneck, the second and later ones strided; [N, C, H, W] to logits."""

    def __init__(self, in_channels: int, classes: int, planes: tuple[int, ...], blocks: int):
        from torchvision.models.resnet import Bottleneck

        super().__init__()
        channels = 4 * planes[0]
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        )
        stages: list[nn.Module] = []
        for index, width in enumerate(planes):
            for block in range(blocks):
                stride = 2 if index and not block else 1
                shortcut = None
                if stride != 1 or channels != 4 * width:
                    shortcut = nn.Sequential(
                        nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
                    )
                stages.append(Bottleneck(channels, width, stride, shortcut))
                channels = 4 * width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def small_resnet(
    in_channels: int = 1, classes: int = 10, planes: tuple[int, ...] = (8, 16), blocks: int = 2, seed: int | None = None
) -> SmallResNet:
    """A SmallResNet in channels_last with torchvision's initialisation; drawn from `seed` alone if one is given."""
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        model = SmallResNet(in_channels, classes, planes, blocks)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model.to(memory_format=torch.channels_last)
