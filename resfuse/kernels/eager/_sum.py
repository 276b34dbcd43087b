"""The tail that `expand` and `apply` share: weigh, add the residual, rectify, round once, take the mask."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..interface import Act, Norm, Padded, Residual, Second, Sum, Want, Written
from ._rows import empty_image, pack_mask, parts, product
from .prepare import prepare


def _held(residual: Residual) -> Act | None:
    """What holds a residual's rows."""
    if isinstance(residual, Norm):
        return residual.z
    return residual.x if isinstance(residual, Second | Padded) else residual


def _value(residual: Residual, rows: Tensor) -> tuple[Tensor, slice]:
    """The values to add, and the channels that get them."""
    if isinstance(residual, Norm):
        y = (rows * residual.scale).add_(residual.shift)
        return (y.relu_() if residual.relu else y), slice(None)
    if isinstance(residual, Second):
        return product(rows, residual.weight.t()).mul_(residual.scale).add_(residual.shift), slice(None)
    if isinstance(residual, Padded):
        return rows, slice(residual.before, residual.before + rows.shape[1])
    return rows, slice(None)


def write_sum(
    source: Tensor, main: Callable[[Tensor, Tensor], Tensor], channels: int, total: Sum, want: Want
) -> Written:
    """The sum, part by part; main(rows of source, rows of out) gives fresh wide [rows, channels], or out's own rows if
    they are wide."""
    out = empty_image(source, channels)
    pixels = out.numel() // channels
    mask = out.new_empty((pixels, -(-channels // 8) if want.mask else 0), dtype=torch.uint8)
    held = _held(total.residual)
    held = held if held is None else prepare(held)
    samples = None if total.row_scale is None else _per_row(total.row_scale, out)
    optional = {"held": held, "gate": total.gate, "samples": samples}
    given = {name: t for name, t in optional.items() if t is not None}
    for out_part, mask_part, part, *others in parts(out, mask, source, *given.values()):
        rows = dict(zip(given, others, strict=True))
        y = main(part, out_part)
        if samples is not None:
            y.mul_(rows["samples"])
        if total.gate is not None:
            y.mul_(rows["gate"])
        if held is not None:
            value, where = _value(total.residual, rows["held"])
            if total.gate is not None:
                value = value * (1 - rows["gate"].to(y.dtype)[:, where])
            y[:, where].add_(value)
        if total.scale != 1:
            y.mul_(total.scale)
        if total.relu:
            y.relu_()
        if y.data_ptr() != out_part.data_ptr():
            out_part.copy_(y)
        if want.mask:
            pack_mask((out_part <= 0).logical_not_(), mask_part)
    return Written(out, mask if want.mask else None)


def _per_row(row_scale: Tensor, out: Tensor) -> Tensor:
    """[N] as [M, 1]: a factor for each row."""
    return row_scale.repeat_interleave(out.shape[2] * out.shape[3])[:, None]
