"""The tail that `expand` and `apply` share: add the residual, rectify, round once, take the mask."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..interface import Norm, Residual, Second
from ._rows import empty_image, pack_mask, parts, product


def _residual(residual: Residual) -> tuple[Tensor | None, Callable[[Tensor], Tensor]]:
    """The tensor that holds a residual's rows, and the function from rows to values to add."""
    if isinstance(residual, Norm):
        def value(z: Tensor) -> Tensor:
            y = (z * residual.scale).add_(residual.shift)
            return y.relu_() if residual.relu else y
        return residual.z, value
    if isinstance(residual, Second):
        weight = residual.weight.t()
        return residual.x, lambda x: product(x, weight).mul_(residual.scale).add_(residual.shift)
    return residual, lambda rows: rows


def write_sum(
    source: Tensor, main: Callable[[Tensor, Tensor], Tensor], channels: int,
    residual: Residual, relu: bool, want_mask: bool,
) -> tuple[Tensor, Tensor | None]:
    """out = act(main + residual), part by part; main(rows of source, rows of out) gives fresh wide [rows, channels],
    or out's own rows if they are wide."""
    out = empty_image(source, channels)
    pixels = out.numel() // channels
    mask = out.new_empty((pixels, -(-channels // 8) if want_mask else 0), dtype=torch.uint8)
    held, value = _residual(residual)
    for out_part, mask_part, part, *other in parts(out, mask, source, *([] if held is None else [held])):
        y = main(part, out_part)
        if other:
            y.add_(value(other[0]))
        if relu:
            y.relu_()
        if y.data_ptr() != out_part.data_ptr():
            out_part.copy_(y)
        if want_mask:
            pack_mask((out_part <= 0).logical_not_(), mask_part)
    return out, mask if want_mask else None
