"""A small image folder from the photographs that ship with scikit-learn: python -m examples.sample_photographs FOLDER

Random crops: train/ from the left two thirds of both, val/ from the right third, so that no pixel is in both parts.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

CROPS = {"train": 256, "val": 64}  # of each photograph
LARGEST = 160  # pixels of a crop's side before it is resized


def write(folder: Path, size: int, seed: int = 0) -> None:
    """folder/{train,val}/{china,flower}/NNN.jpg, of size x size pixels."""
    from sklearn.datasets import load_sample_images

    rng, photographs = random.Random(seed), load_sample_images()
    for name, pixels in zip(photographs.filenames, photographs.images, strict=True):
        image = Image.fromarray(pixels)
        border = image.width * 2 // 3
        for part, (left, right) in {"train": (0, border), "val": (border, image.width)}.items():
            target = folder / part / Path(name).stem
            target.mkdir(parents=True, exist_ok=True)
            for i in range(CROPS[part]):
                side = rng.randint(size, max(size, LARGEST))
                x, y = rng.randint(left, right - side), rng.randint(0, image.height - side)
                crop = image.crop((x, y, x + side, y + side)).resize((size, size), Image.Resampling.BILINEAR)
                crop.save(target / f"{i:03}.jpg", quality=90)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=64, help="pixels of a side, at most 200; default: 64")
    options = parser.parse_args(arguments)
    if not 1 <= options.size <= 200:
        parser.error(f"--size must be between 1 and 200, got {options.size}")
    write(options.folder, options.size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
