"""Device functions that the kernels share: operands as tiles of rows and channels.

Rows beyond M and channels beyond the last are read as 0. No predicate made of indices stands between an activation and
the product that reads it: that would send the operand of each step through shared memory.

The assembler runs Hopper's products one after another, and says so, where it cannot prove that the sums are defined and
read by products alone while they are in flight. Two hints prevent it in every kernel of this set: a loop of products is
said to run at least once, so that no zeros are merged into its sums, and an addition of 0 stands before their readers.
"""

import triton
import triton.language as tl


@triton.jit
def rectify(y):
    """ReLU as torch's: NaN stays."""
    return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activate(t, scale, shift, RELU: tl.constexpr):
    """act(scale * t + shift) rounded to t's dtype: the one function that every reader of a recipe goes through."""
    y = tl.fma(t.to(tl.float32), scale, shift)
    if RELU:
        y = rectify(y)
    return y.to(t.dtype)


@triton.jit
def as_read(t, PRECISION: tl.constexpr):
    """What a product reads of t. tf32 is rounded here, to nearest, because the matrix units cut its bits off."""
    if PRECISION == "tf32":
        rounded = ((t.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        t = tl.where(t == t, rounded, t)
    return t


@triton.jit
def row_starts(view, index, channels):
    """Where each row begins: rows follow one another, or are the pixels of a strided view."""
    if view is None:
        return index.to(tl.int64) * channels
    else:
        pixel = index % view.pixels
        line, column = pixel // view.width, pixel % view.width
        return (index // view.pixels).to(tl.int64) * view.sample + line.to(tl.int64) * view.line + column * view.pixel


@triton.jit
def load_tile(at, starts, cols, inside, channels, EVEN: tl.constexpr):
    """[rows, cols] of a row matrix; EVEN: every column of the tile exists."""
    mask = inside[:, None] if EVEN else inside[:, None] & (cols < channels)[None, :]
    return tl.load(at + starts[:, None] + cols[None, :], mask=mask, other=0.0)


@triton.jit
def load_vector(at, cols, channels, EVEN: tl.constexpr):
    """[1, cols] of a vector."""
    if EVEN:
        return tl.load(at + cols)[None, :]
    else:
        return tl.load(at + cols, mask=cols < channels, other=0.0)[None, :]


@triton.jit
def load_act(a, starts, cols, inside, channels, RELU: tl.constexpr, EVEN: tl.constexpr):
    """A tile of an `Act`, in storage dtype."""
    t = load_tile(a.x, starts, cols, inside, channels, EVEN)
    if a.scale is not None:
        scale = load_vector(a.scale, cols, channels, EVEN)
        shift = load_vector(a.shift, cols, channels, EVEN)
        t = activate(t, scale, shift, RELU)
    return t


@triton.jit
def load_bits(mask, index, first, inside, channels, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """bool [rows, cols] of a mask of bytes or words, `first` being the first column."""
    BITS: tl.constexpr = mask.dtype.element_ty.primitive_bitwidth
    words = (channels + BITS - 1) // BITS
    at = first // BITS + tl.arange(0, BLOCK_K // BITS)
    word = tl.load(
        mask + index.to(tl.int64)[:, None] * words + at[None, :], mask=inside[:, None] & (at < words)[None, :], other=0
    )
    bits = (word[:, :, None] >> tl.arange(0, BITS)[None, None, :]) & 1
    return bits.reshape(BLOCK_M, BLOCK_K) != 0


@triton.jit
def store_bits(keep, mask, index, first, inside, channels, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """bool [rows, cols] into a mask of bytes or words."""
    BITS: tl.constexpr = mask.dtype.element_ty.primitive_bitwidth
    words = (channels + BITS - 1) // BITS
    at = first // BITS + tl.arange(0, BLOCK_K // BITS)
    bits = keep.to(tl.int32).reshape(BLOCK_M, BLOCK_K // BITS, BITS) << tl.arange(0, BITS)[None, None, :]
    word = tl.sum(bits, 2).to(mask.dtype.element_ty)
    to = mask + index.to(tl.int64)[:, None] * words + at[None, :]
    tl.store(to, word, mask=inside[:, None] & (at < words)[None, :])


@triton.jit
def load_grad(
    g, index, first, inside, channels, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, valid=None,
    limit=None,
):  # fmt: skip
    """A tile of a `Grad`, in storage dtype; its columns begin at `first`, and are 0 from `limit` (channels) on. valid:
    [rows] of 1, and 0 where the row is padding, which is 0 then: what would be said by a predicate between the recipe
    and a product that reads it."""
    cols = first + tl.arange(0, BLOCK_K)
    starts = index.to(tl.int64) * channels
    if limit is not None:
        channels = limit
    t = load_tile(g.dout, starts, cols, inside, channels, EVEN)
    dtype: tl.constexpr = t.dtype
    if g.mask is not None:
        keep = load_bits(g.mask, index, first, inside, channels, BLOCK_M, BLOCK_K)
        t = tl.where(keep, t, 0.0).to(dtype)
    if g.factor is not None:
        if g.row_scale is not None:
            weight = tl.load(g.row_scale + index // g.pixels, mask=inside, other=0.0) * g.factor
            t = t.to(tl.float32) * weight[:, None]
        else:
            t = t.to(tl.float32) * g.factor
    if g.z is not None:
        t = t.to(tl.float32)
        z = load_tile(g.z, starts, cols, inside, channels, EVEN)
        if g.shift is not None:
            scale = load_vector(g.scale, cols, channels, EVEN)
            y = activate(z, scale, load_vector(g.shift, cols, channels, EVEN), False)
            t = tl.where(y <= 0, 0.0, t)
        if g.slope is not None:
            mean, mean_dy = load_vector(g.mean, cols, channels, EVEN), load_vector(g.mean_dy, cols, channels, EVEN)
            if valid is not None:
                mean, mean_dy = mean * valid[:, None], mean_dy * valid[:, None]
            t = t - mean_dy - (z.to(tl.float32) - mean) * load_vector(g.slope, cols, channels, EVEN)
    if g.times is not None:
        t = t.to(tl.float32) * load_vector(g.times, cols, channels, EVEN)
    return t.to(dtype)


@triton.jit
def add_grad_product(
    acc, g, weight, index, inside, cols, outer, inner, EVEN_OUTER: tl.constexpr, EVEN_INNER: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """acc + g @ weight[:, cols]; g [M, outer], weight [outer, inner]."""
    tl.assume(outer > 0)
    for k in range(0, outer, BLOCK_K):
        t = load_grad(g, index, k, inside, outer, EVEN_OUTER, BLOCK_M, BLOCK_K)
        w = load_weight(weight, k + tl.arange(0, BLOCK_K), cols, outer, inner, EVEN_OUTER, EVEN_INNER)
        acc = tl.dot(as_read(t, PRECISION), as_read(w, PRECISION), acc, input_precision=PRECISION)
    return acc + 0.0


@triton.jit
def add_act_product(
    acc, a, weight, starts, inside, cols, inner, outer, RELU: tl.constexpr, EVEN_INNER: tl.constexpr,
    EVEN_OUTER: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """acc + a @ weight[cols].T; a [M, inner], weight [outer, inner]."""
    tl.assume(inner > 0)
    for k in range(0, inner, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)
        t = load_act(a, starts, depth, inside, inner, RELU, EVEN_INNER)
        w = load_weight(weight, cols, depth, outer, inner, EVEN_OUTER, EVEN_INNER)
        acc = tl.dot(as_read(t, PRECISION), as_read(w, PRECISION).T, acc, input_precision=PRECISION)
    return acc + 0.0


@triton.jit
def load_weight(at, rows, cols, outer, inner, EVEN_ROWS: tl.constexpr, EVEN_COLS: tl.constexpr):
    """[rows, cols] of a matrix [outer, inner]; rows and cols in either role, each EVEN where all exist."""
    to = at + rows[:, None] * inner + cols[None, :]
    if EVEN_ROWS:
        if EVEN_COLS:
            return tl.load(to)
        else:
            return tl.load(to, mask=(cols < inner)[None, :], other=0.0)
    else:
        if EVEN_COLS:
            return tl.load(to, mask=(rows < outer)[:, None], other=0.0)
        else:
            return tl.load(to, mask=(rows < outer)[:, None] & (cols < inner)[None, :], other=0.0)
