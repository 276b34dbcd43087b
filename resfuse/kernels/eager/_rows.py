"""Row matrices, chunks, masks and rounding: what the primitives of this set share."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..interface import wide

# A chunk of rows is worked on in wide precision while it stays in cache; a GPU takes larger ones to fill itself.
_CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}
_BITS = (1, 2, 4, 8, 16, 32, 64, 128)
_GATHER_BITS = 0x0102040810204080  # times eight 0/1 bytes: bit j of the top byte is byte j


def rows(t: Tensor) -> Tensor:
    """[N, C, H, W] as [N*H*W, C]; a view if t is dense in channels_last, a copy if it is a strided view."""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def image(r: Tensor, like: Tensor) -> Tensor:
    """Rows [M, K] as [N, K, H, W] in channels_last, with N, H, W of `like`."""
    n, _, h, w = like.shape
    return r.view(n, h, w, r.shape[1]).permute(0, 3, 1, 2)


def empty_image(like: Tensor, channels: int) -> Tensor:
    n, _, h, w = like.shape
    return torch.empty((n, channels, h, w), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def chunks(count: int, channels: int, device: torch.device, most: int | None = None) -> Iterator[slice]:
    """Row slices whose widest matrix has about the elements that suit the device, and on a CPU `most` rows."""
    step = max(1, _CHUNK_ELEMENTS[device.type] // channels)
    if most is not None and device.type == "cpu":
        step = min(step, most)
    return (slice(i, min(i + step, count)) for i in range(0, count, step))


def pack_mask(positive: Tensor, into: Tensor) -> None:
    """bool [M, K] into uint8 [M, ceil(K/8)]: channel 8i+j is bit j, padding bits 0."""
    count, channels = positive.shape
    if channels % 8:
        positive = torch.nn.functional.pad(positive, (0, -channels % 8))
    octets = positive.contiguous().view(torch.int64)  # little-endian: byte j is channel 8i+j
    into.copy_((octets * _GATHER_BITS >> 56) & 0xFF)


def unpack_mask(mask: Tensor, channels: int) -> Tensor:
    """uint8 [M, ceil(K/8)] as bool [M, K]."""
    bits = torch.tensor(_BITS, dtype=torch.uint8, device=mask.device)
    return (mask.unsqueeze(-1) & bits).ne(0).flatten(1)[:, :channels]


def tf32_products(t: Tensor) -> bool:
    """Whether torch's switch lets matrix products of t round their operands to tf32."""
    return t.is_cuda and t.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"


def as_read(t: Tensor) -> Tensor:
    """t in wide precision with the values that a matrix product reads (rounded to tf32 where that is on)."""
    if not tf32_products(t):
        return t.to(wide(t.dtype))
    return round_to_tf32(t).double()  # the products that follow must not round again


def round_to_tf32(t: Tensor) -> Tensor:
    """float32 rounded to tf32's 10 mantissa bits, to nearest, ties away from zero."""
    return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of matrices in storage dtype (or already wide), accumulated and returned wide."""
    if a.dtype == wide(a.dtype):
        return a @ b.to(a.dtype)
    if a.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
