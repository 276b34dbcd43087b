"""The CUDA set's coefficients, emulated: exact, in any order of threads, reading what their files say. On a GPU, of
larger matrices: exact, and the same bits every time."""

import pytest
import seeded
import torch
from units import CUDA, EMULATED, own

from resfuse.kernels.interface import Affine
from resfuse.testing.cuda import emulated, on_gpu

pytestmark = pytest.mark.usefixtures("exact")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# Outer and inner channels: parts of tiles; one tile, single channels; several of them; whole tiles.
COEFFICIENTS = [(136, 72), (13, 7), (40, 131), (64, 128)]
LARGE = [(256, 64), (2048, 512), (1000, 333)]


def coefficients(outer, inner, dtype):
    generator = torch.Generator().manual_seed(5)

    def random(*size):
        return torch.randn(size, generator=generator)

    weight, rows = random(outer, inner).to(dtype), random(3 * inner, inner)
    scale, invstd = random(outer), random(outer).abs() + 0.1
    wg = (weight.float() * scale[:, None]).to(dtype)
    mean, cov = random(inner), torch.cov(rows.T, correction=0).reshape(inner, inner)
    operands = random(outer, inner), random(outer), weight, wg, mean, cov, Affine(scale, scale, invstd), 1000
    return operands, own("expand_stats")(weight, mean, cov), own("expand_coefficients")(*operands)


def infinite():
    """Statistics where a weight is infinite; coefficients of products of each size."""
    weight, cov, vector = torch.ones(3, 7), torch.eye(7) + 1, torch.ones(3)
    weight[0, 6] = float("inf")
    found = [*own("expand_stats")(weight, torch.ones(7), cov)]
    for size in (float("inf"), float("nan"), 0.0, 1e-38, 3e38):
        operands = torch.full((3, 7), size), vector, torch.ones(3, 7), weight, torch.ones(7), cov
        found += own("expand_coefficients")(*operands, Affine(vector, vector, vector), 1000)
    return found


@EMULATED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outer, inner", COEFFICIENTS)
def test_coefficients(outer, inner, dtype):
    tiles, reach = -(-inner // 64), sum(min(inner, 64 * i) for i in range(1, -(-inner // 64) + 1))
    with emulated() as library:
        (products, total, weight, wg, mean, cov, affine, count), stats, found = coefficients(outer, inner, dtype)
        assert library.traffic(weight) == weight.nbytes * (2 * tiles + -(-inner // 32) + 1)
        assert library.traffic(products) == products.nbytes * (tiles + 1) and library.traffic(wg) == wg.nbytes
        assert library.traffic(cov) == cov.nbytes * -(-outer // 32)
        assert all(library.traffic(t, written=True) == t.nbytes for t in found)
        own("expand_stats")(weight, mean, cov)
        assert library.traffic(weight) == weight.nbytes + weight.element_size() * outer * reach
        above = sum(min(inner, i + 64) * (min(inner, i + 64) - i) for i in range(0, inner, 64))
        assert library.traffic(cov) == 4 * above * -(-outer // 16)
    for order in (1, 2):
        with emulated(order=order, seed=7):
            the_same(coefficients(outer, inner, dtype)[1:], (stats, found))
    exact_coefficients((products, total, weight, wg, mean, cov, affine, count), stats, found, dtype)


@CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outer, inner", [*COEFFICIENTS, *LARGE])
def test_coefficients_on_a_gpu(outer, inner, dtype):
    with on_gpu():
        operands, *first = coefficients(outer, inner, dtype)
        for _ in range(2):
            the_same(coefficients(outer, inner, dtype)[1:], first)
    exact_coefficients(operands, *first, dtype)


def the_same(again, first):
    pairs = zip((*again[0], *again[1]), (*first[0], *first[1]), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


def exact_coefficients(operands, stats, found, dtype):
    products, total, weight, wg, mean, cov, affine, count = operands
    dgamma, dweight, q, q_scale, c = found
    p, w, covariance, scale, invstd = (t.double() for t in (products, weight, cov, affine.scale, affine.invstd))
    along = invstd * (p * w).sum(1)
    full = w.T @ (w * (scale * invstd * along / count)[:, None])
    pairs = [
        (stats.mean, w @ mean.double()), (stats.var, ((w @ covariance) * w).sum(1)), (dgamma, along),
        (dweight, scale[:, None] * (p - (along * invstd)[:, None] * (w @ covariance))),
        (c, total.double() / count @ wg.double() - q_scale.double() * (mean.double() @ q.double())),
    ]  # fmt: skip
    for ours, exactly in pairs:
        assert (ours.double() - exactly).norm() <= 1e-6 * exactly.norm()
    assert q.dtype == dtype and 1 <= q.abs().max() <= 2 and q_scale.log2().frac() == 0
    assert (q.double() * q_scale.double() - full).norm() <= (torch.finfo(dtype).eps / 2 + 1e-6) * full.norm()


@EMULATED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_coefficients_of_misaligned_matrices(dtype):
    """Value by value, in the same order."""
    with emulated():
        operands, stats, found = coefficients(64, 128, dtype)
        for place in (0, 2, 3, 5):
            moved = [t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t) if i == place else t
                     for i, t in enumerate(operands[:6])]  # fmt: skip
            again = *own("expand_stats")(moved[2], *moved[4:]), *own("expand_coefficients")(*moved, *operands[6:])
            pairs = zip(again, (*stats, *found), strict=True)
            assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


@EMULATED
def test_coefficients_that_are_not_finite_or_hardly_there():
    with emulated():
        mean, var, *found = infinite()
    assert mean.tolist() == [float("inf"), 7, 7] and var.tolist() == [float("inf"), 56, 56]
    qs, scales = found[2::5], [q_scale.item() for q_scale in found[3::5]]
    assert scales[:3] == [1, 1, 1] and qs[0].isinf().all() and qs[1].isnan().all() and not qs[2].any()
    assert 0 < scales[3] < torch.finfo(torch.float32).tiny and 1 <= qs[3].max() <= 2, "subnormal"
    assert scales[4] == 1 and qs[4].isinf().all(), "it overflows on the way"


BUGS = [  # file, what stands there, what stands there instead, what the emulator or the numbers say
    ("device/small_product.h", "if (row < m.rows && column < m.columns)", "if (column < m.columns)", "out-of-bounds"),
    ("device/small_product.h", "if (row < m.rows && column < m.columns)", "if (row < m.rows)", "out-of-bounds|numbers"),
    ("device/small_product.h", "return kChunks % kThreads == 0 || index(i) < kChunks;", "return true;",
     "out-of-bounds|race"),
    ("device/small_product.h", "times[i] = factor(deep);", "times[i] = factor(begin);", "numbers"),
    ("device/small_product.h", "        left.load(begin + kDepth);\n", "", "numbers"),
    ("device/small_product.h", "      __syncthreads();  // what was there has been read\n", "", "race"),
    ("device/small_product.h", "      __syncthreads();  // the slices are whole\n", "", "race|uninitialised"),
    ("device/small_product.h", "    __syncthreads();  // the slices have been read\n", "", "race"),
    ("device/small_product.h", "    __syncthreads();  // the groups' sums are whole\n", "", "race|uninitialised"),
    ("device/small_product.h", "    if (!has()) return;\n", "", "out-of-bounds"),
    ("expand_stats.cu", "  if (!Product::has()) return;\n", "", "out-of-bounds|race"),
    ("expand_stats.cu", "if (Product::column() != 0 || k >= K) return;", "if (Product::column() != 0) return;",
     "out-of-bounds"),
    ("expand_stats.cu", "if (Product::column() != 0 || k >= K) return;", "if (k >= K) return;", "race"),
    ("expand_stats.cu", "      if (c + i >= C) break;\n", "", "numbers"),
    ("expand_stats.cu", "left.factor.column = right.first = next;", "right.first = next;", "numbers"),
    ("expand_coefficients.cu", "if (c0 == 0 && ProductT::column() == 0 && k < K)",
     "if (c0 == 0 && ProductT::column() == 0)", "out-of-bounds"),
    ("expand_coefficients.cu", "if (c0 == 0 && ProductT::column() == 0 && k < K)",
     "if (ProductT::column() == 0 && k < K)", "race"),
    ("expand_coefficients.cu", "k < K ? invstd[k] : 0.0f", "invstd[k]", "out-of-bounds"),
    ("expand_coefficients.cu", "k < K ? scale[k] : 0.0f", "scale[k]", "out-of-bounds"),
    ("expand_coefficients.cu", "  if (k >= K || c >= C) return;\n", "  if (c >= C) return;\n", "out-of-bounds"),
    ("expand_coefficients.cu", "  if (k >= K || c >= C) return;\n", "  if (k >= K) return;\n", "out-of-bounds|race"),
    ("expand_coefficients.cu", "return k < K ? factor[k] : 0.0f;", "return factor[k];", "out-of-bounds"),
    ("expand_coefficients.cu", "  if (blockIdx.y > blockIdx.x) return;", "  //", "race|out-of-bounds"),
    ("expand_coefficients.cu", "if (ProductQ::has() && r < C && c < C)", "if (r < C && c < C)",
     "numbers|out-of-bounds|race"),
    ("expand_coefficients.cu", "if (ProductQ::has() && r < C && c < C)", "if (ProductQ::has() && c < C)",
     "out-of-bounds|race"),
    ("expand_coefficients.cu", "if (ProductQ::has() && r < C && c < C)", "if (ProductQ::has() && r < C)",
     "out-of-bounds|race"),
    ("expand_coefficients.cu", "      if (c + i >= C) break;\n", "", "out-of-bounds|race"),
    ("expand_coefficients.cu", "if (r0 != c0) full", "full", "race"),
    ("expand_coefficients.cu", "  if (threadIdx.x % 32 == 0) of_warp", "  of_warp", "race"),
    ("expand_coefficients.cu", "  __syncthreads();  // every warp has said its own\n  if", "  if",
     "race|uninitialised"),
    ("expand_coefficients.cu", "  __syncthreads();  // every warp has said its own\n  for", "  for",
     "race|uninitialised"),
    ("expand_coefficients.cu", "i < tiles; i += kThreads", "i <= tiles; i += kThreads", "out-of-bounds"),
    ("expand_coefficients.cu", "if (blockIdx.x == 0 && tid == 0)", "if (tid == 0)", "race"),
    ("expand_coefficients.cu", "k < K; k += kDownQ", "k <= K; k += kDownQ", "out-of-bounds"),
    ("expand_coefficients.cu", "r < C; r += kDownQ", "r <= C; r += kDownQ", "out-of-bounds"),
    ("expand_coefficients.cu", "if (first < C) store", "store", "out-of-bounds|race"),
    ("expand_coefficients.cu", "  __syncthreads();  // every thread's share is there\n", "", "race|uninitialised"),
    ("expand_coefficients.cu", "  __syncthreads();  // the parts are whole\n", "", "race|uninitialised"),
    ("expand_coefficients.cu", "if (part != 0 || to >= C) return;", "if (part != 0) return;", "out-of-bounds"),
]  # fmt: skip


def everything():
    """Something of every kernel, on all shapes."""
    found = [t for case in COEFFICIENTS for results in coefficients(*case, torch.bfloat16)[1:] for t in results]
    return found + infinite()


expected, test_a_bug_is_seen = seeded.tests(__name__, BUGS)
