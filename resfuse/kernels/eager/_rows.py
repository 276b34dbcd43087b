"""Row matrices part by part, masks and rounding: what the primitives of this set share."""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from ..interface import wide
from ..rounding import reduced_products, round_to_tf32
from ..vendor import dense as dense
from ..vendor import layout as layout

# A part is worked on in wide precision while it stays in cache; a GPU takes larger ones to fill itself.
_PART_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}
_GATHER_BITS = 0x0102040810204080  # times eight 0/1 bytes: bit j of the top byte is byte j


def empty_image(like: Tensor, channels: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised [N, channels, H, W] with like's N, H, W, layout and, unless given, dtype."""
    n, _, h, w = like.shape
    return torch.empty((n, channels, h, w), dtype=dtype or like.dtype, device=like.device, memory_format=layout(like))


def parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each tensor, part by part, as matrices [rows, channels].

    4-d tensors [N, C, H, W] are read as rows of channels, 2-d ones (masks) have those rows already. Dense tensors give
    views, to be written through as well; contiguous (NCHW) ones a sample at a time, with columns running in memory.
    """
    tensors = tuple(dense(t) if t.dim() == 4 else t for t in tensors)
    images = [t for t in tensors if t.dim() == 4]
    step = max(1, _PART_ELEMENTS[images[0].device.type] // max(t.shape[1] for t in images))
    n, pixels = images[0].shape[0], images[0].shape[2] * images[0].shape[3]
    samples = n if all(layout(t) == torch.channels_last for t in images) else 1
    for first in range(0, n, samples):
        matrices = [
            t[first : first + samples].permute(0, 2, 3, 1).view(samples * pixels, t.shape[1]) if t.dim() == 4
            else t[first * pixels : (first + samples) * pixels]
            for t in tensors
        ]
        for i in range(0, samples * pixels, step):
            yield tuple(m[i : i + step] for m in matrices)


def columns_run(matrix: Tensor) -> bool:
    """Whether a [rows, channels] matrix is stored channel by channel, as a sample of an NCHW tensor is."""
    return matrix.stride(0) == 1 < matrix.stride(1)


def pack_mask(positive: Tensor, into: Tensor) -> None:
    """bool [M, K] into uint8 [M, ceil(K/8)]: channel 8i+j is bit j, padding bits 0."""
    missing = -positive.shape[1] % 8
    if columns_run(positive):
        bits = positive.t().contiguous().view(torch.uint8)
        bits = torch.nn.functional.pad(bits, (0, 0, 0, missing)).view(-1, 8, positive.shape[0])
        place = torch.arange(8, dtype=torch.uint8, device=bits.device)[:, None]
        into.copy_((bits << place).sum(1, dtype=torch.uint8).t())
        return
    if missing:
        positive = torch.nn.functional.pad(positive, (0, missing))
    octets = positive.contiguous().view(torch.int64)  # little-endian: byte j is channel 8i+j
    into.copy_((octets * _GATHER_BITS >> 56) & 0xFF)


def unpack_mask(mask: Tensor, like: Tensor) -> Tensor:
    """uint8 [M, ceil(K/8)] as [M, K] of zero and not zero, in like's dtype and order; like [M, K]."""
    count, channels = like.shape
    if columns_run(like):
        bit = (1 << torch.arange(8, dtype=torch.uint8, device=mask.device))[:, None]
        return (mask.t().contiguous()[:, None] & bit).view(-1, count)[:channels].to(like.dtype).t()
    table = _octets(mask.device, like.dtype)  # a look-up is several times faster than testing bits
    return table.index_select(0, mask.flatten().int()).view(count, -1)[:, :channels]


@cache
def _octets(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[256, 8]: the bits of every byte."""
    bits = [[octet >> bit & 1 for bit in range(8)] for octet in range(256)]
    return torch.tensor(bits, dtype=torch.int8).to(device, dtype)


def as_read(t: Tensor) -> Tensor:
    """t in wide precision with the values that a matrix product of it reads.

    Where products of float32 may round their operands, float64, so that products of this do not.
    """
    reduced = reduced_products(t.device)
    if reduced is None:
        return t.to(wide(t.dtype))
    if t.dtype == torch.float32:
        t = round_to_tf32(t) if reduced == "tf32" else t.bfloat16()
    return t.double()


def product(a: Tensor, b: Tensor, into: Tensor | None = None) -> Tensor:
    """a @ b of matrices in storage dtype (or already wide), accumulated wide and returned so, in a's order.

    into: where to write it, if that is wide.
    """
    if columns_run(a):
        return _multiply(b.t(), a.t(), None if into is None else into.t()).t()
    return _multiply(a, b, into)


def _multiply(a: Tensor, b: Tensor, into: Tensor | None) -> Tensor:
    exact = wide(torch.promote_types(a.dtype, b.dtype))
    if into is not None and into.dtype != exact:
        into = None
    if a.is_cuda and a.dtype == b.dtype != exact and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(a, b, out_dtype=exact)
    return torch.mm(a.to(exact), b.to(exact), out=into)
