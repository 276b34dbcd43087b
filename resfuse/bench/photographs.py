"""Real-image input: random crops of the two photographs that scikit-learn ships."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision's models expect
SMALLEST = 96  # pixels of the smallest crop


@cache
def _images() -> tuple[Tensor, ...]:
    from sklearn.datasets import load_sample_images  # china.jpg and flower.jpg, inside the package

    return tuple(torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255 for image in load_sample_images().images)


def photographs(batch: int, size: int, seed: int = 0) -> Tensor:
    """[batch, 3, size, size] float32, channels_last: square crops of random place and size, resized and normalised."""
    generator = torch.Generator().manual_seed(seed)
    crops = []
    for index in range(batch):
        image = _images()[index % len(_images())]
        height, width = image.shape[1:]
        side = _draw(SMALLEST, min(height, width), generator)
        top, left = _draw(0, height - side, generator), _draw(0, width - side, generator)
        crop = image[None, :, top : top + side, left : left + side]
        crops.append(F.interpolate(crop, (size, size), mode="bilinear", antialias=True))
    x = torch.cat(crops).sub(torch.tensor(MEAN).view(1, 3, 1, 1)).div(torch.tensor(STD).view(1, 3, 1, 1))
    return x.contiguous(memory_format=torch.channels_last)


def _draw(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (1,), generator=generator))
