"""The tail that `expand` and `apply` share: weigh, add the residual, rectify, round once, take the mask."""

import triton
import triton.language as tl

from ._tiles import load_tile, load_vector, rectify, row_starts, store_bits


@triton.jit
def load_residual(s, index, cols, inside, channels, EVEN: tl.constexpr):
    """The residual's tile in storage dtype; asked for before the product, so that it comes while that runs."""
    starts = row_starts(s.view, index, s.channels)
    if s.before is None:
        return load_tile(s.residual, starts, cols, inside, channels, EVEN)
    else:
        own = cols - s.before
        held = inside[:, None] & (own >= 0)[None, :] & (own < s.channels)[None, :]
        return tl.load(s.residual + starts[:, None] + own[None, :], mask=held, other=0.0)


@triton.jit
def write_sum(
    y, residual, s, out, mask, index, first, inside, channels,
    RELU: tl.constexpr, RESIDUAL_RELU: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store act(factor * (gate * row_scale * y + (1 - gate) * residual)) and its mask; y and residual (or None) are
    float32 [rows, cols]. Returns what was stored."""
    cols = first + tl.arange(0, BLOCK_N)
    starts = index.to(tl.int64) * channels
    if s.row_scale is not None:
        y *= tl.load(s.row_scale + index // s.pixels, mask=inside, other=0.0)[:, None]
    if s.gate is not None:
        gate = load_tile(s.gate, starts, cols, inside, channels, EVEN).to(tl.float32)
        y *= gate
    if residual is not None:
        if s.scale is not None:
            scale = load_vector(s.scale, cols, channels, EVEN)
            residual = tl.fma(residual, scale, load_vector(s.shift, cols, channels, EVEN))
            if RESIDUAL_RELU:
                residual = rectify(residual)
        if s.gate is not None:
            residual *= 1 - gate
        y += residual
    if s.factor is not None:
        y *= s.factor
    if RELU:
        y = rectify(y)
    t = y.to(out.dtype.element_ty)
    held = inside[:, None] if EVEN else inside[:, None] & (cols < channels)[None, :]
    tl.store(out + starts[:, None] + cols[None, :], t, mask=held)
    if mask is not None:
        keep = (t <= 0) == 0
        if not EVEN:
            keep = keep & (cols < channels)[None, :]
        store_bits(keep, mask, index, first, inside, channels, BLOCK_M, BLOCK_N)
    return t
