"""Launch choices: tiles by primitive, width of a value, channels and architecture, each with its reason.

Checked without a GPU (registers, shared memory, instructions); not yet measured on one. `rows` x `channels` is the tile
that a program writes, `depth` the piece of the summed dimension that one step reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    rows: int
    channels: int
    depth: int
    warps: int
    stages: int
    reason: str

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Rule:
    """A tile, and when it is taken: the first rule of a primitive that fits."""

    tile: Tile
    bytes: int | None = None  # of a stored value; None: any
    up_to: int | None = None  # written channels; None: any
    least_arch: int = 80

    def fits(self, dtype: torch.dtype, channels: int, arch: int) -> bool:
        return (
            (self.bytes is None or dtype.itemsize == self.bytes)
            and (self.up_to is None or channels <= self.up_to)
            and arch >= self.least_arch
        )


FEW = "few channels fill no larger tile"
ROWS = (
    Rule(Tile(128, 32, 32, 4, 3, FEW), 2, 32),
    Rule(Tile(128, 64, 64, 4, 3, "all of a bottleneck's 64 inner channels, and the activation read once"), 2, 64),
    Rule(Tile(128, 128, 64, 8, 3, "eight warps keep the sums of 128 x 128 in registers"), 2),
    Rule(Tile(64, 32, 32, 4, 3, FEW), 4, 32),
    Rule(Tile(64, 64, 32, 4, 3, "float32 on the vector units: 32 sums a thread"), 4),
)
OUTER = (
    Rule(Tile(64, 32, 32, 4, 2, FEW), 2, 32),
    Rule(Tile(64, 64, 64, 4, 3, "synchronous products: small tiles, several blocks on a multiprocessor"), 2),
    Rule(Tile(32, 32, 32, 4, 2, FEW), 4, 32),
    Rule(Tile(32, 64, 64, 4, 2, "float32 on the vector units: 32 sums a thread"), 4),
)
ELEMENTS = (
    Rule(Tile(128, 32, 0, 4, 1, FEW), None, 32),
    Rule(Tile(64, 64, 0, 4, 1, "128 bytes a row in 16 bits; 32 values a thread in flight"), None, 64),
    Rule(Tile(32, 128, 0, 4, 1, "256 bytes a row in 16 bits; 32 values a thread in flight")),
)
TABLE = {
    "conv_stats": ROWS,
    "expand": ROWS,
    "expand_dgrad": ROWS,
    "conv_backward": ROWS,
    "covariance": OUTER,
    "outer_product": OUTER,
    "elements": ELEMENTS,
}
# Programs that share the rows of a sum, all channels together: a few on each multiprocessor of the largest GPUs. A
# constant, so that results do not depend on which GPU computes them.
SHARES = 528


def tile(primitive: str, dtype: torch.dtype, channels: int, arch: int) -> Tile:
    """The tile of a primitive that writes `channels` channels."""
    return next(rule.tile for rule in TABLE[primitive] if rule.fits(dtype, channels, arch))


def shares(rows: int, block: int, tiles: int = 1) -> tuple[int, int]:
    """(shares, blocks of rows in each) of a sum over rows, when `tiles` tiles of channels share them alike."""
    blocks = -(-rows // block)
    each = -(-blocks // max(1, SHARES // tiles))
    return -(-blocks // each), each
