"""What the experiments share: their sizes, the networks trained once for all of them, and the form of a result."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field

import torch

import resfuse

from .data import Data
from .networks import Network, train


@dataclass(frozen=True)
class Settings:
    """depths: blocks of the networks that are compared, of two layers each. plain_depth, depth: of the plain and the
    residual network that lesions are done to: a plain one of the latter would not train. draws: of each random thing.
    """

    depths: tuple[int, ...] = (2, 4, 8, 16, 32)
    plain_depth: int = 4
    depth: int = 32
    width: int = 16
    stem_stride: int = 1
    steps: int = 200
    batch: int = 64
    rate: float = 0.1
    drop_path: float = 0.3
    test_images: int = 450
    draws: int = 16
    swaps: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32)
    path_images: int = 32
    path_draws: int = 10
    points: int = 64
    lines: int = 4


DIGITS = Settings()
CIFAR10 = Settings(stem_stride=2, steps=1000, test_images=1000)
QUICK = Settings(
    depths=(1, 3), plain_depth=1, depth=3, width=4, steps=3, batch=16, test_images=32, draws=2, swaps=(0, 1, 2),
    path_images=4, path_draws=2, points=8, lines=1,
)


@dataclass
class Claim:
    """A sentence with the numbers that it was judged by."""

    sentence: str
    held: bool


@dataclass
class Finding:
    """What one experiment found: its table, its claims, and everything it measured, ready for JSON."""

    name: str
    title: str
    columns: list[str]
    rows: list[list[str]]
    claims: list[Claim]
    data: dict

    @property
    def held(self) -> bool:
        return all(claim.held for claim in self.claims)

    def as_dict(self) -> dict:
        return {"held": self.held, "claims": [asdict(claim) for claim in self.claims], **self.data}


@dataclass
class Study:
    """Data, sizes and seed, and each network that some experiment has asked for."""

    data: Data
    settings: Settings = DIGITS
    seed: int = 0
    device: str = "cpu"
    trained_networks: dict[tuple, tuple[Network, list[float]]] = field(default_factory=dict)

    def fresh(self, kind: str, depth: int, drop_path: float = 0.0, seed: int | None = None) -> Network:
        """Drawn from the seed alone, whatever was drawn before."""
        torch.manual_seed(self.seed if seed is None else seed)
        channels, classes = self.data.images.shape[1], int(self.data.labels.max()) + 1
        its = self.settings
        network = Network(kind, depth, its.width, channels, classes, its.stem_stride, drop_path)
        return network.to(self.device, memory_format=torch.channels_last)  # the layout our kernels are fastest in

    def trained(self, kind: str, depth: int, drop_path: float = 0.0) -> tuple[Network, list[float]]:
        """The network, in eval mode, and its losses step by step."""
        key = kind, depth, drop_path
        if key not in self.trained_networks:
            network, its = self.fresh(*key), self.settings
            losses = train(network, self.data, its.steps, its.batch, its.rate, self.seed)
            self.trained_networks[key] = network, losses
        return self.trained_networks[key]

    @property
    def test(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.data.test_images[: self.settings.test_images], self.data.test_labels[: self.settings.test_images]

    @property
    def rng(self) -> random.Random:
        """Begins anew at each call, so that no experiment depends on those before it."""
        return random.Random(self.seed)

    def fallbacks(self) -> list[list]:
        """(network, block, code, text, count) of calls of fused blocks that ran the original forward."""
        size = (1, *self.data.images.shape[1:])
        return [
            ["-".join(map(str, key)), *row]
            for key, (network, _) in self.trained_networks.items()
            for row in resfuse.report(network, input_size=size).fallbacks
        ]
