"""A small bottleneck ResNet trained on scikit-learn's digits, eager and fused, from the same start on the same batches.

Two curves of one seed differ only by rounding that training amplifies; curves of different seeds differ by their start
and their batches. Fused training follows eager's where the first distance, at every seed, is at most the second.
"""

from __future__ import annotations

import copy
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import resfuse

from ..testing.conditioning import largest_kappa
from ..testing.environment import environment
from ..testing.models import small_resnet
from .results import SCHEMA, write_json

BATCH, RATE, WINDOW = 64, 0.01, 10
Fuse = Callable[[nn.Module], nn.Module]


@dataclass
class Verification:
    """Loss curves (seed by seed, step by step), test accuracies, and the distances they are judged by.

    distance: the largest over seeds of fused from eager; spread: the median over pairs of seeds of eager from eager.
    kappa: largest condition of a variance in the trained models, and the convolution it belongs to.
    """

    device: str
    steps: int
    seeds: list[int]
    eager: list[list[float]]
    fused: list[list[float]]
    eager_accuracy: list[float]
    fused_accuracy: list[float]
    distance: float
    spread: float
    kappa: float
    kappa_at: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.distance <= self.spread


def verify(
    seeds: Iterable[int] = range(3), steps: int = 200, device: torch.device | str = "cpu", fuse: Fuse = resfuse.fuse,
    make: Callable[..., nn.Module] = small_resnet, autocast: torch.dtype | None = None,
) -> Verification:
    """Train make(seed=seed) twice, for every seed, in float32 or under autocast. At least two seeds are needed for a
    spread (ValueError)."""
    seeds, began = list(seeds), time.perf_counter()
    if len(seeds) < 2:
        raise ValueError(f"verify needs at least 2 seeds to know eager's own spread, got {len(seeds)}")
    data = [part.to(device) for part in digits()]
    eager, fused, eager_accuracy, fused_accuracy, kappas = [], [], [], [], []
    for seed in seeds:
        start = make(seed=seed).to(device)
        model = copy.deepcopy(start)
        eager.append(train(model, data, seed, steps, autocast))
        eager_accuracy.append(accuracy_of(model, data))
        kappas.append(largest_kappa(model, data[0][:BATCH]))
        model = fuse(copy.deepcopy(start))
        fused.append(train(model, data, seed, steps, autocast))
        fused_accuracy.append(accuracy_of(model, data))
    distance = max(curve_distance(a, b) for a, b in zip(eager, fused, strict=True))
    spread = median(curve_distance(a, b) for a, b in combinations(eager, 2))
    return Verification(
        str(device), steps, seeds, eager, fused, eager_accuracy, fused_accuracy, distance, spread, *max(kappas),
        time.perf_counter() - began,
    )


def show(found: Verification, console: Console) -> None:
    """Losses along the way, accuracies, and the verdict."""
    table = Table(title=f"Training on digits, {found.steps} steps: loss", title_justify="left", title_style="bold")
    table.add_column("seed")
    table.add_column("model")
    marks = sorted({0, *range(found.steps // 5 - 1, found.steps, max(found.steps // 5, 1)), found.steps - 1})
    for mark in marks:
        table.add_column(f"step {mark + 1}", justify="right")
    table.add_column("test accuracy", justify="right")
    for index, seed in enumerate(found.seeds):
        for name, curves, accuracy in (
            ("eager", found.eager, found.eager_accuracy), ("resfuse", found.fused, found.fused_accuracy)
        ):
            losses = [f"{curves[index][mark]:.4f}" for mark in marks]
            table.add_row(str(seed), name, *losses, f"{accuracy[index]:.2%}")
    console.print(table)
    console.print(
        f"Fused from eager {found.distance:.3g} (largest seed), eager seed from seed {found.spread:.3g} (median): "
        + ("[green]within eager's own spread[/]" if found.passed else "[bold red]RED: beyond eager's own spread[/]")
    )
    console.print(f"Largest condition of a variance (kappa): {found.kappa:.3g} at {found.kappa_at}")
    console.print(f"{found.seconds:.0f} s", highlight=False)


def write(found: Verification, json_path: Path | None, png_path: Path | None) -> None:
    """JSON and figure, where a path is given."""
    if json_path is not None:
        content = {
            "schema": SCHEMA,
            "kind": "verify",
            "command": shlex.join(["python", "-m", "resfuse", *sys.argv[1:]]),
            "environment": environment(found.device),
            "passed": found.passed,
            **asdict(found),
        }
        write_json(json_path, content)
    if png_path is not None:
        _plot(found, png_path)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images [N, 1, 8, 8] and labels, then those held out: every fifth."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    images = torch.from_numpy(loaded.images).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(loaded.target).long()
    held_out = torch.arange(len(labels)) % 5 == 0
    return images[~held_out], labels[~held_out], images[held_out], labels[held_out]


def train(
    model: nn.Module, data: list[Tensor], seed: int, steps: int, autocast: torch.dtype | None
) -> list[float]:
    images, labels = data[:2]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=1e-4)
    losses = []
    model.train()
    for _ in range(steps):
        batch = torch.randint(0, len(labels), (BATCH,), generator=generator).to(images.device)
        with torch.autocast(images.device.type, dtype=autocast, enabled=autocast is not None):
            logits = model(images[batch])
        loss = F.cross_entropy(logits.float(), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy_of(model: nn.Module, data: list[Tensor]) -> float:
    model.eval()
    right = model(data[2]).argmax(1) == data[3]
    return right.float().mean().item()


def curve_distance(a: list[float], b: list[float]) -> float:
    """Root mean square of the difference of the logarithms of two curves, each averaged over WINDOW steps.

    Infinite where either holds a loss that is not finite.
    """
    curves = torch.tensor([a, b], dtype=torch.float64)
    window = min(WINDOW, curves.shape[1])
    smooth = curves.unfold(1, window, 1).mean(2).clamp_min(torch.finfo(torch.float32).tiny).log()
    distance = (smooth[0] - smooth[1]).square().mean().sqrt().item()
    return distance if torch.isfinite(curves).all() else float("inf")


def _plot(found: Verification, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for index, seed in enumerate(found.seeds):
        colour = f"C{index}"
        axes.plot(found.eager[index], color=colour, linewidth=2.5, alpha=0.35, label=f"eager, seed {seed}")
        axes.plot(found.fused[index], color=colour, linewidth=0.9, label=f"resfuse, seed {seed}")
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.legend(fontsize=7, frameon=False, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
