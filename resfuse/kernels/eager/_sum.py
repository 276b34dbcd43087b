"""The tail that `expand` and `apply` share: add the residual, rectify, round once, take the mask."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..interface import Norm, Residual, Second, wide
from ._rows import chunks, empty_image, pack_mask, product, rows


def _reader(residual: Residual) -> Callable[[slice], Tensor] | None:
    """A function that gives the residual's values for a slice of rows."""
    if residual is None:
        return None
    if isinstance(residual, Norm):
        z = rows(residual.z)
        def read(part: slice) -> Tensor:
            y = (z[part] * residual.scale).add_(residual.shift)
            return y.relu_() if residual.relu else y
        return read
    if isinstance(residual, Second):
        x, weight = rows(residual.x), residual.weight.t()
        return lambda part: product(x[part], weight).mul_(residual.scale).add_(residual.shift)
    return rows(residual).__getitem__


def write_sum(
    main: Callable[[slice], Tensor], like: Tensor, channels: int, residual: Residual, relu: bool, want_mask: bool
) -> tuple[Tensor, Tensor | None]:
    """out = act(main + residual) chunk by chunk; `main` gives fresh wide [rows, channels]; N, H, W of `like`."""
    out = empty_image(like, channels)
    r = rows(out)
    mask = r.new_empty((r.shape[0], -(-channels // 8)), dtype=torch.uint8) if want_mask else None
    read = _reader(residual)
    for part in chunks(r.shape[0], channels, r.device):
        y = main(part)
        assert y.dtype == wide(r.dtype)
        if read is not None:
            y.add_(read(part))
        r[part] = y.relu_() if relu else y
        if want_mask:
            pack_mask((r[part] <= 0).logical_not_(), mask[part])
    return out, mask
