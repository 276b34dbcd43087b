"""Images to classify: scikit-learn's digits, or CIFAR-10 from a folder."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

TRAINING = [f"data_batch_{i}" for i in range(1, 6)]
ARCHIVE = "cifar-10-batches-py"


class Data(NamedTuple):
    """Float images [N, C, H, W] around zero and their labels, to learn from and held out."""

    name: str
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: torch.device | str) -> Data:
        return Data(self.name, *(part.to(device) for part in self[1:]))


def digits() -> Data:
    """1797 images of 8x8, every fourth held out."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(found.target).long()
    held_out = torch.arange(len(labels)) % 4 == 0
    return Data("digits", images[~held_out], labels[~held_out], images[held_out], labels[held_out])


def cifar10(folder: str | Path) -> Data:
    """The python version's pickles, in the folder or in its `cifar-10-batches-py`; trust them, as pickles can run code.

    FileNotFoundError names the first that is missing.
    """
    folder = Path(folder)
    if not (folder / TRAINING[0]).exists() and (folder / ARCHIVE).is_dir():
        folder = folder / ARCHIVE
    parts = [_batch(folder / name) for name in TRAINING]
    images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return Data("CIFAR-10", images, labels, *_batch(folder / "test_batch"))


def _batch(path: Path) -> tuple[Tensor, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; CIFAR-10's python version has {', '.join(TRAINING)}, test_batch")
    with path.open("rb") as file:
        content = pickle.load(file, encoding="bytes")  # written by Python 2, so its keys are bytes
    images = torch.from_numpy(content[b"data"]).view(-1, 3, 32, 32).float() / 127.5 - 1
    return images, torch.tensor(content[b"labels"])
