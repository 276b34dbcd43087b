"""A hourglass of pre-activation residual units finds a digit in a cluttered canvas: scales are joined by addition.

    python -m examples.hourglass [--steps 150]

Each level adds what comes up from below to a residual unit of its own. Printed: how often the digit is found, and what
a training step keeps against the same network run by eager PyTorch.
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
from resfuse.testing.memory import saved_bytes

CANVAS = 32
DIGIT = 8


class Hourglass(nn.Module):
    """Pre-activation bottlenecks at each of `depth` scales; [N, C, H, W] to the same, H and W multiples of 2**depth."""

    def __init__(self, channels: int, depth: int):
        super().__init__()
        self.skip = unit(channels, channels)
        self.down = unit(channels, channels)
        self.inner = Hourglass(channels, depth - 1) if depth > 1 else unit(channels, channels)
        self.up = unit(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        below = self.up(self.inner(self.down(F.max_pool2d(x, 2))))
        return self.skip(x) + F.interpolate(below, scale_factor=2)


class Finder(nn.Module):
    """[N, 1, H, W] to a map of logits [N, H, W]: where the digit's centre is."""

    def __init__(self, channels: int = 32, depth: int = 3):
        super().__init__()
        self.stem = blocks.ConvBNReLU(1, channels)
        self.hourglass = Hourglass(channels, depth)
        self.end = blocks.BNReLU(channels)
        self.head = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.end(self.hourglass(self.stem(x))))[:, 0]


def unit(in_channels: int, out_channels: int) -> nn.Module:
    return blocks.ResidualBlock(in_channels, out_channels, width=out_channels // 2, preactivation=True)


def batch(n: int, seed: int, train: bool) -> tuple[Tensor, Tensor]:
    """Canvases [N, 1, 32, 32] with one of scikit-learn's digits among strokes cut from others; the flat index of its
    centre [N]."""
    from sklearn.datasets import load_digits

    digits = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    digits = digits[:1500] if train else digits[1500:]
    g = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=g))

    canvases, places = torch.zeros(n, 1, CANVAS, CANVAS), torch.empty(n, dtype=torch.long)
    for canvas, place in zip(canvases, places, strict=True):
        for _ in range(10):
            y, x = draw(CANVAS - 3), draw(CANVAS - 3)
            canvas[0, y : y + 3, x : x + 3] = digits[draw(len(digits)), 2:5, 2:5]
        y, x = draw(CANVAS - DIGIT), draw(CANVAS - DIGIT)
        canvas[0, y : y + DIGIT, x : x + DIGIT] = digits[draw(len(digits))]
        place.fill_((y + DIGIT // 2) * CANVAS + x + DIGIT // 2)
    return canvases, places


def train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    model.train()
    for step in range(steps):
        x, place = batch(32, step, train=True)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x).flatten(1), place).backward()
        optimizer.step()


def found(model: nn.Module, n: int = 256) -> float:
    """Share of digits never seen in training whose centre is found to a pixel."""
    x, place = batch(n, 10**6, train=False)
    model.eval()
    with torch.no_grad():
        guess = model(x).flatten(1).argmax(1)
    rows, columns = guess // CANVAS - place // CANVAS, guess % CANVAS - place % CANVAS
    return ((rows.abs() <= 1) & (columns.abs() <= 1)).float().mean().item()


def kept(model: nn.Module) -> tuple[int, int]:
    """Bytes that a training step keeps: of the same network in eager PyTorch, and fused."""
    x, _ = batch(8, 0, train=True)
    eager, fused = resfuse.unfuse(copy.deepcopy(model)).train(), copy.deepcopy(model).train()
    return saved_bytes(lambda: eager(x), eager), saved_bytes(lambda: fused(x), fused)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = Finder().to(memory_format=torch.channels_last)
    before = found(model)
    train(model, options.steps)
    after = found(model)
    eager, fused = kept(model)
    table = Table(title="Hourglass on digits", title_justify="left")
    for column in ("steps", "found before", "after", "kept by eager", "kept by resfuse"):
        table.add_column(column, justify="right")
    table.add_row(
        str(options.steps), f"{before:.0%}", f"{after:.0%}", f"{eager / 2**20:.1f} MiB",
        f"{fused / 2**20:.1f} MiB ({fused / eager:.2f}x)",
    )
    Console().print(table)
    return 0 if after > before else 1


if __name__ == "__main__":
    sys.exit(main())
