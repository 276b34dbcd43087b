"""Models with inputs: one set-up that errors, memory and time are all measured on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..testing.cases import CASES, make_block, make_gradient, make_input
from ..testing.comparison import MODES, Mode
from ..testing.models import small_resnet
from .implementations import Implementation
from .photographs import photographs
from .results import EVALUATION, TRAINING

CLASSES = 10  # labels are drawn from the first ten of a network's classes


@dataclass(frozen=True)
class Network:
    """A classifier of `size` x `size` photographs, in training or in evaluation."""

    make: Callable[[], nn.Module]
    size: int
    training: bool = True


def _torchvision(name: str) -> nn.Module:
    from torchvision import models

    return getattr(models, name)()


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name)


TORCHVISION = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "wide_resnet50_2", "densenet121", "densenet169",
)
TIMM = ("resnet50d", "seresnet50", "resnetv2_50")
NETWORKS = {
    **{name: Network(partial(_torchvision, name), 224) for name in TORCHVISION},
    **{f"timm-{name}": Network(partial(_timm, name), 224) for name in TIMM},
    "small-resnet": Network(lambda: small_resnet(in_channels=3, classes=CLASSES), 32),
}
NETWORKS |= {f"{name}-eval": replace(network, training=False) for name, network in NETWORKS.items()}


@dataclass
class Workload:
    """model (channels_last, training unless its subject says otherwise), x and target (a block's dout, a network's
    labels) on one device.

    unit_bytes: bytes of one width-channel activation of a block, None for a network.
    """

    subject: str
    mode_name: str
    model: nn.Module
    x: Tensor
    target: Tensor
    unit_bytes: int | None

    @property
    def mode(self) -> Mode:
        return MODES[self.mode_name]

    @property
    def is_block(self) -> bool:
        return self.unit_bytes is not None

    def runner(self, implementation: Implementation) -> Runner:
        """A copy of the model prepared for an implementation, with the input in its layout."""
        layout = implementation.memory_format
        model = implementation.prepare(copy.deepcopy(self.model).to(memory_format=layout))
        x = self.x.detach().contiguous(memory_format=layout).requires_grad_(self.is_block)
        target = self.target.contiguous(memory_format=layout) if self.is_block else self.target
        return Runner(model, x, target, self.mode.autocast, self.is_block)


@dataclass
class Runner:
    """One implementation at work on a workload."""

    model: nn.Module
    x: Tensor
    target: Tensor
    autocast: torch.dtype | None
    is_block: bool

    def output(self) -> Tensor:
        """A block's output, a network's logits."""
        kind = self.x.device.type
        with torch.autocast(kind, dtype=self.autocast) if self.autocast else nullcontext():
            return self.model(self.x)

    def forward(self) -> Tensor:
        """A training forward: a block's output, a network's loss; the graph hangs on it."""
        out = self.output()
        return out if self.is_block else F.cross_entropy(out.float(), self.target)

    def gradients(self, out: Tensor) -> tuple[Tensor, ...]:
        """Gradients of every parameter and, for a block, before them that of x."""
        parameters = list(self.model.parameters())
        if self.is_block:
            return torch.autograd.grad(out, [self.x, *parameters], self.target.to(out.dtype))
        return torch.autograd.grad(out, parameters)

    def step(self) -> None:
        """Forward and backward; the gradients are dropped."""
        self.gradients(self.forward())

    def no_grad(self) -> None:
        with torch.no_grad():
            self.output()

    def inference_mode(self) -> None:
        with torch.inference_mode():
            self.output()

    def passes(self) -> dict[str, Callable[[], object]]:
        """What is timed, by its name in the results."""
        if self.model.training:
            return dict(zip(TRAINING, (self.forward, self.step), strict=True))
        return dict(zip(EVALUATION, (self.no_grad, self.inference_mode), strict=True))


def make(
    subject: str,
    mode: str,
    batch: int,
    device: torch.device | str = "cpu",
    seed: int = 0,
    size: int | None = None,
    kinks: bool = True,
) -> Workload:
    """subject: a name of `testing.cases.CASES` or `NETWORKS`; mode: of `testing.comparison.MODES`.

    size: a network's image size, None for its own; kinks: as in `make_block`, for blocks. KeyError for unknown names.
    """
    if subject in CASES:
        return _block(subject, mode, batch, device, seed, kinks)
    network = NETWORKS[subject]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network.make().to(device=device, dtype=MODES[mode].parameters, memory_format=torch.channels_last)
    x = photographs(batch, size or network.size, seed).to(device=device, dtype=MODES[mode].parameters)
    labels = torch.randint(0, CLASSES, (batch,), generator=torch.Generator().manual_seed(seed)).to(device)
    return Workload(subject, mode, model.train(network.training), x, labels, None)


def _block(
    subject: str, mode_name: str, batch: int, device: torch.device | str, seed: int, kinks: bool
) -> Workload:
    case, mode = replace(CASES[subject], batch=batch), MODES[mode_name]
    return Workload(
        subject,
        mode_name,
        make_block(case, seed, mode.parameters, device=device, kinks=kinks),
        make_input(case, mode.compute, seed=seed, device=device),
        make_gradient(case, mode.compute, seed=seed, device=device),
        case.unit_bytes(mode.compute.itemsize),
    )
