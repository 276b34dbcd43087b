"""The networks of the study and their training: the same for plain and residual ones but for the skip."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse import blocks

from .data import Data

KINDS = {"plain": "none", "residual": "identity"}


class Network(nn.Module):
    """A 3x3 convolution, pre-activated blocks of two 3x3 at one width, the last BatchNorm, mean over places, linear.

    Pre-activation leaves nothing on the skip, so that without its blocks' branches the network is the identity between
    both ends; one width and stride, so that every block can be taken out. Initialisation is PyTorch's own.
    """

    def __init__(
        self, kind: str, depth: int, width: int = 16, channels: int = 1, classes: int = 10, stem_stride: int = 1,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.kind, self.depth = kind, depth
        self.stem = blocks.ConvBNReLU(channels, width, stride=stem_stride)
        self.body = nn.Sequential(*(
            blocks.ResidualBlock(width, width, preactivation=True, shortcut=KINDS[kind], drop_path=drop_path)
            for _ in range(depth)
        ))
        self.end = blocks.BNReLU(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.body(self.stem(x)))

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.end(x).mean((2, 3)))


def train(network: Network, data: Data, steps: int, batch: int, rate: float, seed: int) -> list[float]:
    """The loss of each step of SGD with momentum, the rate falling to zero by a cosine."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    network.train()
    for _ in range(steps):
        chosen = torch.randint(0, len(data.labels), (batch,), generator=generator).to(data.labels.device)
        loss = F.cross_entropy(network(data.images[chosen]), data.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    network.eval()
    return losses


@torch.no_grad()
def error(network: nn.Module, images: Tensor, labels: Tensor, batch: int = 1000) -> float:
    """Share of images classified wrongly; the network must be in eval mode, so that BatchNorm's statistics are those
    of training whatever was taken out."""
    assert not any(module.training for module in network.modules())
    wrong = 0
    for part, its in zip(images.split(batch), labels.split(batch), strict=True):
        wrong += (network(part).argmax(1) != its).sum().item()
    return wrong / len(labels)
