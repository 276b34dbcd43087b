"""A U-Net of our blocks takes noise out of photographs: skips join by concatenation, which nobody keeps.

    python -m examples.unet [--steps 150]

Each step up reads [skip, upsampled] side by side: `blocks.Chain` takes the list, so that no copy of the skip is kept
for backward, nor are the activations inside it. Printed: the noise before and after, and what a training step keeps
against the same network run by eager PyTorch.
"""

from __future__ import annotations

import argparse
import copy
import sys

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import resfuse
from resfuse import blocks
from resfuse.bench.photographs import photographs
from resfuse.testing.memory import saved_bytes


class UNet(nn.Module):
    """Two convolutions at each scale, halving by max pool; [N, 3, H, W] to the same, H and W multiples of 2**depth."""

    def __init__(self, width: int = 16, depth: int = 2):
        super().__init__()
        sizes = [width * 2**i for i in range(depth + 1)]
        self.down = nn.ModuleList(double(in_, out) for in_, out in zip([3, *sizes[:-1]], sizes, strict=True))
        self.up = nn.ModuleList(double(big + small, small) for small, big in zip(sizes[:-1], sizes[1:], strict=True))
        self.head = nn.Conv2d(width, 3, 1)
        nn.init.zeros_(self.head.weight)  # begins as the identity: what it learns is the noise

    def forward(self, x: Tensor) -> Tensor:
        skips, y = [], x
        for i, convs in enumerate(self.down):
            y = convs(y if i == 0 else F.max_pool2d(y, 2))
            skips.append(y)
        skips.pop()
        for convs in reversed(self.up):
            y = convs([skips.pop(), F.interpolate(y, scale_factor=2)])
        return x - self.head(y)


def double(in_channels: int, out_channels: int) -> nn.Module:
    return blocks.Chain(blocks.ConvBNReLU(in_channels, out_channels), blocks.ConvBNReLU(out_channels, out_channels))


def batch(n: int, size: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """(noisy, clean) crops of scikit-learn's photographs."""
    clean = photographs(n, size, seed)
    return clean + noise * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)), clean


def train(model: nn.Module, steps: int, size: int, noise: float) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    model.train()
    for step in range(steps):
        noisy, clean = batch(8, size, noise, step)
        optimizer.zero_grad(set_to_none=True)
        F.mse_loss(model(noisy), clean).backward()
        optimizer.step()


def error(model: nn.Module, size: int, noise: float) -> tuple[float, float]:
    """Mean squared error of crops that were not trained on: of the noisy ones, of the model's."""
    noisy, clean = batch(32, size, noise, 10**6)
    model.eval()
    with torch.no_grad():
        return F.mse_loss(noisy, clean).item(), F.mse_loss(model(noisy), clean).item()


def kept(model: nn.Module, size: int) -> tuple[int, int]:
    """Bytes that a training step keeps: of the same network in eager PyTorch, and fused."""
    x = photographs(4, size, 0)
    eager, fused = resfuse.unfuse(copy.deepcopy(model)).train(), copy.deepcopy(model).train()
    return saved_bytes(lambda: eager(x), eager), saved_bytes(lambda: fused(x), fused)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--size", type=int, default=64, help="pixels of a crop")
    parser.add_argument("--noise", type=float, default=0.5, help="standard deviation, in those of the photographs")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = UNet().to(memory_format=torch.channels_last)
    train(model, options.steps, options.size, options.noise)
    before, after = error(model, options.size, options.noise)
    eager, fused = kept(model, options.size)
    table = Table(title="U-Net on photographs", title_justify="left")
    for column in ("steps", "noise before", "after", "kept by eager", "kept by resfuse"):
        table.add_column(column, justify="right")
    table.add_row(
        str(options.steps), f"{before:.3f}", f"{after:.3f}", f"{eager / 2**20:.1f} MiB",
        f"{fused / 2**20:.1f} MiB ({fused / eager:.2f}x)",
    )
    Console().print(table)
    return 0 if after < before else 1


if __name__ == "__main__":
    sys.exit(main())
