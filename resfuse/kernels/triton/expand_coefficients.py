"""expand_coefficients: dgamma, dweight, Q and c from P and sum(g): C-length and [K, C] algebra in float32.

    T = W @ cov,  dgamma = invstd * rowsum(P * W),  dweight = scale * (P - dgamma * invstd * T)
    Q = W.T @ diag(scale * invstd * dgamma / M) @ W = q_scale * q,  c = (sum_g / M) @ Wg - q_scale * (mean @ q)

Three launches: tiles of W; tiles of Q with the largest entry of each; columns of q.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import Affine
from . import _operands
from ._launch import launch
from ._tiles import as_read, load_weight
from .expand_stats import times_covariance


@triton.jit
def _by_rows(
    products,  # [K, C] float32
    weight,  # [K, C] storage
    cov,  # [C, C] float32
    scale, invstd,  # [K] float32
    dgamma,  # [K] float32
    dweight,  # [K, C] float32
    K, C,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(C, BLOCK_C)
    rows = tl.program_id(0) // columns * BLOCK_R + tl.arange(0, BLOCK_R)
    along = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for j in range(0, C, BLOCK_C):
        cols = j + tl.arange(0, BLOCK_C)
        w = as_read(load_weight(weight, rows, cols, K, C, False, False), PRECISION).to(tl.float32)
        along += w * load_weight(products, rows, cols, K, C, False, False)
    inverse = tl.load(invstd + rows, mask=rows < K, other=0.0)
    factor = tl.load(scale + rows, mask=rows < K, other=0.0)
    own = inverse * tl.sum(along, 1)
    column = tl.program_id(0) % columns
    if column == 0:
        tl.store(dgamma + rows, own, mask=rows < K)
    cols = column * BLOCK_C + tl.arange(0, BLOCK_C)
    t = times_covariance(weight, cov, rows, cols, K, C, PRECISION, BLOCK_R, BLOCK_C)
    value = load_weight(products, rows, cols, K, C, False, False) - (own * inverse)[:, None] * t
    held = (rows < K)[:, None] & (cols < C)[None, :]
    tl.store(dweight + rows[:, None] * C + cols[None, :], factor[:, None] * value, mask=held)


@triton.jit(do_not_specialize=["M"])
def _tiles_of_q(
    weight,  # [K, C] storage
    scale, invstd, dgamma,  # [K] float32
    full,  # [C, C] float32
    largest,  # [tiles] float32
    M, K, C,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(C, BLOCK_C)
    left = tl.program_id(0) // columns * BLOCK_C + tl.arange(0, BLOCK_C)
    right = tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    for k in range(0, K, BLOCK_K):
        rows = k + tl.arange(0, BLOCK_K)
        factor = tl.load(scale + rows, mask=rows < K, other=0.0) * tl.load(invstd + rows, mask=rows < K, other=0.0)
        factor *= tl.load(dgamma + rows, mask=rows < K, other=0.0) / M
        x = as_read(load_weight(weight, rows, left, K, C, False, False), PRECISION).to(tl.float32)
        y = as_read(load_weight(weight, rows, right, K, C, False, False), PRECISION).to(tl.float32)
        acc = tl.dot(x.T, y * factor[:, None], acc, input_precision="ieee")
    held = (left < C)[:, None] & (right < C)[None, :]
    tl.store(full + left[:, None] * C + right[None, :], acc, mask=held)
    tl.store(largest + tl.program_id(0), tl.max(tl.max(tl.abs(acc), 1), 0))


@triton.jit(do_not_specialize=["tiles", "M"])
def _columns_of_q(
    full, largest,  # of `_tiles_of_q`
    wg,  # [K, C] storage
    sum_g, mean,  # [K], [C] float32
    q,  # [C, C] storage
    q_scale,  # one float32
    c,  # [C] float32
    tiles, M, K, C,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    most = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, tiles, BLOCK_T):
        at = first + tl.arange(0, BLOCK_T)
        most = tl.maximum(most, tl.load(largest + at, mask=at < tiles, other=0.0))
    # The power of two at or below the largest entry: its exponent alone; 1 where there is none, or no finite one.
    power = (tl.max(most, 0).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = tl.where((power > 0) & (power < float("inf")), power, 1.0)
    if tl.program_id(0) == 0:
        tl.store(q_scale, power)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    shift = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i in range(0, C, BLOCK_R):
        rows = i + tl.arange(0, BLOCK_R)
        held = (rows < C)[:, None] & (cols < C)[None, :]
        t = (load_weight(full, rows, cols, C, C, False, False) / power).to(q.dtype.element_ty)
        tl.store(q + rows[:, None] * C + cols[None, :], t, mask=held)
        centre = tl.load(mean + rows, mask=rows < C, other=0.0)
        shift += centre[:, None] * as_read(t, PRECISION).to(tl.float32)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for k in range(0, K, BLOCK_R):
        rows = k + tl.arange(0, BLOCK_R)
        w = as_read(load_weight(wg, rows, cols, K, C, False, False), PRECISION).to(tl.float32)
        total += (tl.load(sum_g + rows, mask=rows < K, other=0.0) / M)[:, None] * w
    tl.store(c + cols, tl.sum(total, 0) - power * tl.sum(shift, 0), mask=cols < C)


def expand_coefficients(
    products: Tensor, sum_g: Tensor, weight: Tensor, wg: Tensor, mean: Tensor, cov: Tensor, affine: Affine, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (outer, inner), precision = weight.shape, _operands.precision(weight)
    scale, _, invstd = affine
    columns = -(-inner // 32)
    dgamma, dweight, full, largest, c = (
        products.new_empty(size) for size in ((outer,), (outer, inner), (inner, inner), (columns**2,), (inner,))
    )
    q, q_scale = torch.empty_like(full, dtype=weight.dtype), products.new_empty(())
    block = 32 if inner <= 32 else 64
    launch(
        _by_rows, -(-outer // 16) * -(-inner // block), weight, products, weight, cov, scale, invstd, dgamma, dweight,
        outer, inner, PRECISION=precision, BLOCK_R=16, BLOCK_C=block, num_warps=4,
    )
    launch(
        _tiles_of_q, columns**2, weight, weight, scale, invstd, dgamma, full, largest, count, outer, inner,
        PRECISION=precision, BLOCK_K=32, BLOCK_C=32, num_warps=4,
    )
    launch(
        _columns_of_q, -(-inner // 16), weight, full, largest, wg, sum_g, mean, q, q_scale, c, columns**2, count,
        outer, inner, PRECISION=precision, BLOCK_T=64, BLOCK_R=64, BLOCK_C=16, num_warps=4,
    )
    return dgamma, dweight, q, q_scale, c
