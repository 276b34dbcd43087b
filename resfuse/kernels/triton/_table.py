"""Launch choices: tiles by primitive, width of a value, channels and architecture, each with its reason.

Those that say so were the fastest of some twenty on an H100, at stages 1 and 3 of ResNet-50 with batch 256 in bfloat16;
the others are checked without a GPU (registers, shared memory, instructions). `rows` x `channels` is the tile that a
program writes, `depth` the piece of the summed dimension that one step reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..interface import Geometry


@dataclass(frozen=True)
class Tile:
    rows: int
    channels: int
    depth: int
    warps: int
    stages: int
    reason: str
    shares: int = 528  # programs that share the rows of a sum: a constant, so that results do not depend on the GPU

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Rule:
    """A tile, and when it is taken: the first rule of a primitive that fits."""

    tile: Tile
    bytes: int | None = None  # of a stored value; None: any
    up_to: int | None = None  # written channels; None: any
    archs: range = range(80, 1000)
    outer: range = range(1, 1 << 31)  # the other size of a product that is summed over rows

    def fits(self, dtype: torch.dtype, channels: int, arch: int, outer: int) -> bool:
        return (
            (self.bytes is None or dtype.itemsize == self.bytes)
            and (self.up_to is None or channels <= self.up_to)
            and arch in self.archs
            and outer in self.outer
        )


HOPPER, BLACKWELL = range(90, 100), range(100, 1000)
H100 = "measured on an H100"
FEW = "few channels fill no larger tile"
TWO = "two blocks of eight warps on a multiprocessor: what one waits for, the other hides"
THREE = "three blocks on a multiprocessor, each with two blocks of rows on their way"
VECTOR_UNITS = "float32 on the vector units: 16 sums a thread"
PIXELS = "the addresses of a window's pixels leave fewer registers for the sums"
FEW_ROWS = Rule(Tile(64, 32, 32, 4, 3, FEW), 2, 32)
FLOAT32_ROWS = (Rule(Tile(32, 32, 32, 8, 2, FEW), 4, 32), Rule(Tile(64, 64, 32, 8, 2, VECTOR_UNITS), 4))
TABLE = {
    "conv_stats": (
        FEW_ROWS,
        Rule(Tile(128, 64, 64, 8, 3, f"all of a bottleneck's 64 inner channels; {TWO}"), 2, 64),
        Rule(Tile(128, 64, 64, 8, 3, "the sums come from tensor memory, and wider ones spill"), 2, None, BLACKWELL),
        Rule(Tile(128, 128, 64, 8, 3, "arithmetic weighs more: the largest tile whose sums stay in registers"), 2),
        *FLOAT32_ROWS,
    ),
    "expand": (
        FEW_ROWS,
        Rule(Tile(64, 128, 64, 4, 2, H100), 2, 256, HOPPER),
        Rule(Tile(64, 128, 64, 4, 4, H100), 2, None, HOPPER),
        Rule(Tile(64, 128, 32, 8, 3, f"the residual is on its way while the product runs; {TWO}"), 2, 512),
        Rule(Tile(128, 128, 64, 8, 3, "arithmetic weighs more: the largest tile whose sums stay in registers"), 2),
        *FLOAT32_ROWS,
    ),
    "expand_narrow": (
        Rule(Tile(64, 32, 0, 4, 3, FEW), 2, 32),
        Rule(Tile(64, 64, 0, 4, 3, f"{THREE}; 268 us at stage 1 on an H200, 381 block by block", 396), 2),
    ),
    "expand_dgrad": (
        FEW_ROWS,
        Rule(Tile(128, 64, 32, 4, 4, H100), 2, 64, HOPPER),
        Rule(Tile(64, 128, 32, 4, 3, f"{H100} with a depth of 64, which serialises a product here"), 2, None, HOPPER),
        Rule(Tile(128, 64, 32, 8, 3, f"{TWO}; with a depth of 64 the first product's wgmma are serialised"), 2),
        *FLOAT32_ROWS,
    ),
    "conv_backward": (
        FEW_ROWS,
        Rule(Tile(64, 64, 32, 8, 3, f"as below, of 64 channels; {TWO}"), 2, 64),
        Rule(Tile(64, 128, 32, 4, 3, H100), 2, 256, HOPPER),
        Rule(Tile(64, 128, 64, 4, 3, H100), 2, None, HOPPER),
        Rule(Tile(64, 128, 32, 8, 3, f"a recipe of two tensors and a mask in registers; {TWO}"), 2),
        FLOAT32_ROWS[0],
        Rule(Tile(64, 64, 32, 8, 2, VECTOR_UNITS), 4, None, range(90, 1000)),
        Rule(Tile(64, 32, 32, 8, 2, "before Hopper tf32 leaves fewer registers for the sums"), 4),
    ),
    "dgrad_narrow": (
        Rule(Tile(64, 32, 0, 4, 3, FEW), 2, 32),
        Rule(Tile(64, 64, 0, 4, 3, f"{THREE}; 364 us at stage 1 on an H200, 466 block by block", 396), 2),
    ),
    "conv_window": (
        FEW_ROWS,
        Rule(Tile(128, 64, 32, 8, 3, TWO), 2, 64),
        Rule(Tile(128, 64, 32, 8, 3, "the sums come from tensor memory, and wider ones spill"), 2, None, BLACKWELL),
        Rule(Tile(128, 128, 64, 8, 3, "arithmetic weighs more: the largest tile whose sums stay in registers"), 2),
        *FLOAT32_ROWS,
    ),
    "conv_window_dgrad": (
        FEW_ROWS,
        Rule(Tile(128, 64, 32, 8, 3, f"a recipe of two tensors in registers; {TWO}"), 2, 64),
        Rule(Tile(64, 128, 32, 8, 3, f"as above, of more channels; {TWO}"), 2),
        FLOAT32_ROWS[0],
        Rule(Tile(64, 32, 32, 8, 2, PIXELS), 4, None, range(90, 1000)),
        Rule(Tile(32, 64, 32, 8, 2, PIXELS), 4),
    ),
    "conv_window_wgrad": (
        Rule(Tile(32, 32, 32, 8, 2, f"{FEW}; eight warps, for the addresses of a window's pixels"), None, 32),
        Rule(Tile(64, 64, 32, 8, 1, "tensor memory: a second stage spills"), 2, None, BLACKWELL),
        Rule(Tile(64, 64, 32, 8, 3, "synchronous products: many warps hide one another's waits"), 2),
        Rule(Tile(64, 64, 32, 8, 2, VECTOR_UNITS), 4, None, range(90, 1000)),
        Rule(Tile(64, 32, 32, 8, 2, PIXELS), 4),
    ),
    "conv_few": (  # a step is a line of the window
        Rule(Tile(128, 32, 0, 4, 3, FEW), 2, 32),
        Rule(Tile(128, 64, 0, 4, 4, "many lines on their way; the fastest of five on an H200"), 2),
    ),
    "few_wgrad": (  # of rows x all values of the window; on an H200 a depth of 32 took 596 us instead of 722, untested
        Rule(Tile(64, 0, 64, 8, 3, "all values of a window beside 64 outputs: 64 sums a thread", 264), 2),
    ),
    "covariance": (
        Rule(Tile(32, 32, 32, 4, 2, FEW), None, 32),
        Rule(Tile(64, 64, 64, 4, 3, H100, 264), 2, None, HOPPER),
        Rule(Tile(64, 64, 32, 8, 3, "synchronous products: many warps hide one another's waits"), 2),
        Rule(Tile(64, 64, 32, 8, 2, VECTOR_UNITS), 4),
    ),
    "outer_product": (
        Rule(Tile(32, 32, 32, 4, 2, FEW), None, 32),
        Rule(Tile(64, 64, 64, 4, 3, H100), 2, 64, HOPPER, range(1, 65)),
        Rule(Tile(128, 64, 64, 8, 3, H100, 264), 2, 64, HOPPER),
        Rule(Tile(64, 128, 64, 8, 3, H100, 264), 2, None, HOPPER, range(1, 65)),
        Rule(Tile(128, 128, 64, 8, 3, H100, 264), 2, None, HOPPER),
        Rule(Tile(64, 64, 32, 8, 2, "tensor memory: a third stage spills in float16"), 2, None, BLACKWELL),
        Rule(Tile(64, 64, 32, 8, 3, "synchronous products: many warps hide one another's waits"), 2),
        Rule(Tile(64, 64, 32, 4, 2, "float32 on the vector units: 32 sums a thread"), 4),
    ),
    "bn_stats": (
        Rule(Tile(32, 32, 0, 4, 1, FEW), None, 32),
        Rule(Tile(128, 64, 0, 4, 1, f"64 values a thread; {H100}"), 2),
        Rule(Tile(64, 64, 0, 4, 1, "128 or 256 bytes a row; 32 values a thread in flight")),
    ),
    "elements": (
        Rule(Tile(32, 32, 0, 4, 1, FEW), None, 32),
        Rule(Tile(64, 64, 0, 4, 1, H100), 2, None, HOPPER),
        Rule(Tile(64, 64, 0, 4, 1, "128 bytes a row in 16 bits; 32 values a thread in flight"), None, 64),
        Rule(Tile(32, 128, 0, 4, 1, "256 bytes a row in 16 bits; 32 values a thread in flight")),
    ),
    "max_pool": (
        Rule(Tile(32, 32, 0, 4, 1, FEW), None, 32),
        Rule(Tile(32, 64, 0, 8, 1, "the address of each tap in registers: 8 values a thread")),
    ),
}  # fmt: skip
# Where operands are tensors, of which nothing is computed in registers.
OF_TENSORS = {
    "expand_dgrad": Rule(Tile(64, 128, 64, 4, 3, H100), 2, None, HOPPER),
    "conv_backward": Rule(Tile(128, 128, 64, 4, 3, H100), 2, None, HOPPER),
    "outer_product": Rule(Tile(128, 128, 64, 4, 3, H100, 264), 2, None, HOPPER, range(65, 1 << 31)),
}
for name, rule in OF_TENSORS.items():
    few = (r for r in TABLE[name] if r.up_to is not None and r.up_to <= 64)
    TABLE[f"{name} of tensors"] = (*few, rule, *TABLE[name])


class Own(NamedTuple):
    """A convolution with a window, or one of its gradients, that may be ours: kernel, architecture, bytes of a value,
    input channels of a group, stride, groups."""

    kernel: str
    arch: int
    bytes: int
    channels: int
    stride: tuple[int, int]
    groups: int


# Those that are ours rather than the vendor's: where a measurement says that ours is faster. None does yet.
WINDOWS: frozenset[Own] = frozenset()


def written_first(recipe: Tensor, arch: int) -> bool:
    """Whether a recipe [N, C, H, W] is written out before products read it, rather than computed in each of their
    tiles. On an H100 at stages 2 to 4 the two gradients of a 1x1 took 469 / 382 / 341 us from a recipe and 385 / 278 /
    217 us with it written first; with 64 channels a pass more over the rows weighs more than what it spares."""
    return recipe.element_size() == 2 and recipe.shape[1] >= 128 and arch in HOPPER


def narrow(like: Tensor, inner: int, arch: int) -> bool:
    """Whether a program of a product of `inner` channels goes through blocks of rows (`_narrow.py`). On an H200 at
    stage 1 that was 1.4 times as fast in `expand` and 1.3 times in `conv_backward` as a program for each."""
    return like.element_size() == 2 and inner <= 64 and arch in HOPPER


def few_channels(dtype: torch.dtype, arch: int) -> bool:
    """Whether a network's first convolution, and its weight's gradient, are ours. On an H200 ResNet-50's, with
    statistics, took 588 us and the vendor's 1770 without; its weight's gradient 722 us with BatchNorm's backward in it,
    the vendor's 1100 without."""
    return dtype.itemsize == 2 and arch in HOPPER


def by_vendor(like: Tensor, outer: int, inner: int, arch: int) -> bool:
    """Whether a weight's gradient from two tensors is the vendor's product. On an H200 that took 71 / 42 / 38 us at
    stages 2 to 4 in eager's step, ours 97 / 98 / 95 in this set's: its blocks share what they read."""
    return like.is_cuda and like.element_size() == 2 and min(outer, inner) >= 128 and arch in HOPPER


def ours(kernel: str, weight: Tensor, geometry: Geometry, arch: int) -> bool:
    """Whether a window's kernel is ours there."""
    return own(kernel, weight, geometry, arch) in WINDOWS


def own(kernel: str, weight: Tensor, geometry: Geometry, arch: int) -> Own:
    return Own(kernel, arch, weight.element_size(), weight.shape[1], tuple(geometry.stride), geometry.groups)


def tile(primitive: str, dtype: torch.dtype, channels: int, arch: int, outer: int = 1) -> Tile:
    """The tile of a primitive that writes `channels` channels, or [outer, channels] sums over rows."""
    return next(rule.tile for rule in TABLE[primitive] if rule.fits(dtype, channels, arch, outer))


def shares(rows: int, block: int, tiles: int, most: int) -> tuple[int, int]:
    """(shares, blocks of rows in each) of a sum over rows, when `tiles` tiles of channels share them alike, by about
    `most` programs in all."""
    blocks = -(-rows // block)
    each = -(-blocks // max(1, most // tiles))
    return -(-blocks // each), each
