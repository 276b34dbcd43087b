"""The CUDA set's products by rows, emulated: exact, in any order of threads, reading what their files say. On a GPU,
larger ones: exact, and the same bits every time."""

import os

import pytest
import seeded
import torch
from units import CUDA, EMULATED, activation, own

from resfuse.kernels.interface import BNGrad, Geometry, Masked, Norm, Second, Sum, Want
from resfuse.kernels.rounding import round_to_tf32
from resfuse.testing.cuda import emulated, on_gpu

PRECISIONS = ["float32", "tf32", "bfloat16", "float16"]
POINT = Geometry((1, 1), (0, 0), (1, 1), 1)
# Pixels, outer and inner channels: parts of tiles of 128 columns and rows; single channels; more steps than stages.
CASES = [((1, 12, 11), 136, 72), ((3, 5, 7), 13, 20), ((1, 9, 8), 64, 264)]
# More tiles of rows than a GPU has multiprocessors, or columns of tiles; parts of them and none.
LARGE = [((16, 56, 56), 256, 64), ((9, 29, 31), 520, 136), ((16, 14, 14), 256, 1024), ((11, 41, 37), 65, 131)]


def operands(pixels, outer, inner, dtype):
    (n, h, w), generator = pixels, torch.Generator().manual_seed(3)

    def vectors(count, size):
        return [torch.rand(size, generator=generator) + 0.5 for _ in range(count)]

    def mask(channels):
        return torch.randint(0, 256, (n * h * w, -(-channels // 8)), generator=generator, dtype=torch.uint8)

    x, second, add = (activation(n, inner, h, w, dtype=dtype, seed=seed) for seed in (1, 2, 3))
    dout, z, residual = (activation(n, outer, h, w, dtype=dtype, seed=seed) for seed in (4, 5, 6))
    scale, shift = vectors(2, inner)
    weight = (torch.randn(outer, inner, generator=generator) / inner**0.5).to(dtype)
    q = torch.randn(inner, inner, generator=generator).to(dtype)
    return {
        "a": Norm(x, scale, shift - 1), "b": Norm(second, *vectors(2, inner)), "weight": weight,
        "second_weight": (torch.randn(outer, inner, generator=generator) / inner**0.5).to(dtype),
        "vectors": vectors(4, outer), "residual": residual, "q": (q, torch.tensor(0.25), *vectors(1, inner)),
        "g": Masked(dout, mask(outer), *vectors(1, n), 0.5), "add": Masked(add, mask(inner)),
        "bn": BNGrad(Masked(dout, mask(outer)), z, *vectors(4, outer), vectors(1, outer)[0] - 1),
    }  # fmt: skip


def results(pixels, outer, inner, dtype):
    """Of every kernel, and what it was given."""
    o = operands(pixels, outer, inner, dtype)
    scale, shift, second_scale, second_shift = o["vectors"]
    filters = o["weight"][:, :, None, None]
    z, stats = own("conv_stats")(o["a"], filters, POINT, True)
    added = own("expand")(o["a"], o["weight"], scale, shift, Sum(o["residual"]), Want(True, True))
    second = Second(o["b"], o["second_weight"], second_scale, second_shift)
    projected = own("expand")(o["a"], o["weight"], scale, shift, Sum(second, relu=False), Want(True, True))
    da = own("expand_dgrad")(o["g"], None, o["a"], o["weight"], *o["q"], True, None)
    through = own("conv_backward")(o["bn"], o["a"], filters, POINT, o["add"], (True, True))
    below = own("conv_backward")(o["g"], o["a"], filters, POINT, None, (True, True))
    return o, {
        "conv_stats": (z, *stats), "expand": (added.out, added.mask, *added.stats),
        "projection": (projected.out, projected.mask, *projected.stats), "expand_dgrad": (da,),
        "through BatchNorm": through, "below a mask": below,
    }  # fmt: skip


def matrix(t):
    return t.double().permute(0, 2, 3, 1).reshape(-1, t.shape[1])


@pytest.fixture
def precision(request, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", request.param == "tf32")
    # On other GPUs than Hopper it changes nothing.
    monkeypatch.setenv("RESFUSE_WGMMA", "1" if request.param == "warpgroups" else "0")
    dtypes = {"tf32": torch.float32, "warpgroups": torch.bfloat16}
    return request.param, dtypes.get(request.param) or getattr(torch, request.param)


@EMULATED
@pytest.mark.one_in(3)
@pytest.mark.parametrize("precision", PRECISIONS, indirect=True)
@pytest.mark.parametrize("pixels, outer, inner", CASES)
def test_products_by_rows(pixels, outer, inner, precision):
    products_by_rows(pixels, outer, inner, precision, 1, [emulated(order=order, seed=7) for order in range(3)])


@CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("precision", [*PRECISIONS, "warpgroups"], indirect=True)
@pytest.mark.parametrize("pixels, outer, inner", [*CASES, *LARGE])
def test_products_by_rows_on_a_gpu(pixels, outer, inner, precision):
    products_by_rows(pixels, outer, inner, precision, 4, [on_gpu() for _ in range(3)])


def products_by_rows(pixels, outer, inner, precision, slack, runs):
    """slack: for sums, which matrix units cut off where the emulator rounds."""
    name, dtype = precision
    first, *others = runs
    with first:
        o, found = results(pixels, outer, inner, dtype)
        a, b = (own("apply")(o[key], Sum(), Want()).out for key in "ab")
        g, dz, add = own("select")(o["g"]), own("bn_dgrad")(o["bn"]), own("select")(o["add"])
    for run in others:
        with run:
            again = results(pixels, outer, inner, dtype)[1]
        for key, values in found.items():
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(again[key], values, strict=True)), key

    def read(t):
        return (round_to_tf32(t) if name == "tf32" else t).double()

    def rows(t):
        return matrix(read(t))

    (scale, shift, second_scale, second_shift), w = o["vectors"], read(o["weight"])
    q, q_scale, c = o["q"]
    main = rows(a) @ w.T * scale + shift
    residual = rows(b) @ read(o["second_weight"]).T * second_scale + second_shift
    below = rows(g) @ w - q_scale * (rows(a) @ read(q)) - c
    expected = {
        "conv_stats": rows(a) @ w.T, "expand": (main + matrix(o["residual"])).relu(), "projection": main + residual,
        "expand_dgrad": below.where(matrix(a) > 0, 0), "through BatchNorm": rows(dz) @ w + matrix(add),
        "below a mask": rows(g) @ w,
    }  # fmt: skip
    eps = torch.finfo(dtype).eps
    for key, exactly in expected.items():
        out, *rest = found[key]
        rounding = 8 * slack * eps if dtype == torch.float32 else eps
        assert (matrix(out) - exactly).norm() <= rounding * exactly.norm(), key
        if key in ("conv_stats", "expand", "projection"):
            mean, var = rest[-2:]
            stored = matrix(out)
            assert (mean - stored.mean(0)).norm() <= 1e-6 * stored.norm() / len(stored) ** 0.5, key
            assert (var - stored.var(0, correction=0)).norm() <= 1e-5 * var.norm(), key
        if key in ("expand", "projection"):
            bits = rest[0][:, torch.arange(outer) // 8] >> torch.arange(outer) % 8 & 1
            assert torch.equal(bits.bool(), matrix(out) > 0), key
        if key in ("through BatchNorm", "below a mask"):
            exactly = rows(dz if key == "through BatchNorm" else g).T @ rows(a)
            assert (rest[0].flatten(1) - exactly).norm() <= 1e-6 * slack * exactly.norm(), key


@EMULATED
def test_warpgroups_give_the_same_bits(monkeypatch):
    """Products by wgmma, in another order of threads, beside those by mma.sync: the emulator's units round alike."""
    for case in (CASES[0], CASES[2]):
        with monkeypatch.context() as asked, emulated():
            asked.setenv("RESFUSE_WGMMA", "0")
            expected = results(*case, torch.bfloat16)[1]
        with monkeypatch.context() as asked, emulated(order=2, seed=7) as library:
            asked.setenv("RESFUSE_WGMMA", "1")
            o, found = results(*case, torch.bfloat16)
            own("conv_stats")(o["a"], o["weight"][:, :, None, None], POINT, True)
            assert library.stat("mma") and not library.stat("ldmatrix")
        for key, values in found.items():
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(values, expected[key], strict=True)), key


@EMULATED
@pytest.mark.parametrize("precision", PRECISIONS, indirect=True)
@pytest.mark.parametrize("pixels, outer, inner", CASES[1:])
def test_traffic(pixels, outer, inner, precision):
    """A row is read once for each tile of columns; the matrix units do the products, without bank conflicts."""
    name, dtype = precision
    even = outer % 8 == inner % 8 == 0
    with emulated() as library:

        def across(columns):
            return -(-columns // (128 if even and dtype != torch.float32 and columns > 64 else 64))

        def read(t, times):
            assert library.traffic(t) == t.nbytes * times

        def wrote(*tensors):
            assert all(library.traffic(t, written=True) == t.nbytes for t in tensors)

        o = operands(pixels, outer, inner, dtype)
        filters, (scale, shift, *_) = o["weight"][:, :, None, None], o["vectors"]
        z, _ = own("conv_stats")(o["a"], filters, POINT, False)
        read(o["a"].z, across(outer))
        wrote(z)
        assert bool(library.stat("mma")) == (name != "float32")
        assert library.stat("ldmatrix_cycles") == library.stat("ldmatrix"), "bank conflicts"
        written = own("expand")(o["a"], o["weight"], scale, shift, Sum(o["residual"]), Want(mask=True))
        read(o["a"].z, across(outer))
        read(o["residual"], 1)
        wrote(written.out, written.mask)
        da = own("expand_dgrad")(o["g"], None, o["a"], o["weight"], *o["q"], False, None)
        read(o["a"].z, across(inner))
        read(o["g"].dout, across(inner))
        wrote(da)
        assert library.stat("ldmatrix_cycles") == library.stat("ldmatrix"), "bank conflicts"
        da, _ = own("conv_backward")(o["bn"], o["a"], filters, POINT, o["add"], (True, False))
        read(o["bn"].z, -(-inner // 64))
        read(o["bn"].dy.dout, -(-inner // 64))
        read(o["add"].dout, 1)
        wrote(da)


@EMULATED
def test_u_stands_for_the_product_in_either_dtype():
    o = operands((2, 5, 4), 24, 16, torch.bfloat16)
    u = activation(2, 16, 5, 4, dtype=torch.float32, seed=9)
    with emulated():
        given = own("expand_dgrad")(o["g"], u, o["a"], o["weight"], None, None, None, False, None)
        assert torch.equal(given, u.bfloat16())
        stored = own("expand_dgrad")(o["g"], u.bfloat16(), o["a"], o["weight"], None, None, None, False, None)
        assert torch.equal(stored, u.bfloat16())


@EMULATED
def test_every_second_pixel_is_read_where_it_lies():
    o = operands((2, 6, 5), 24, 16, torch.bfloat16)
    filters = o["weight"][:, :, None, None]
    strided = Geometry((2, 2), (0, 0), (1, 1), 1)
    with emulated():
        z, stats = own("conv_stats")(o["a"], filters, strided, True)
        whole, _ = own("conv_stats")(o["a"], filters, POINT, False)
    assert torch.equal(z, whole[:, :, ::2, ::2])
    assert torch.allclose(stats.mean, matrix(z).mean(0).float(), rtol=1e-5, atol=1e-6)


BUGS = [  # file, what stands there, what stands there instead, what the emulator or the numbers say
    ("device/row_product.h", "left.load_bits((step + 1) * Math::kDepth);", "left.load_bits(step * Math::kDepth);",
     "numbers"),
    ("device/row_product.h", "    __syncthreads();  // the tiles are whole; and", "    // the tiles are whole; and",
     "race|uninitialised|async-copy"),
    ("device/row_product.h", "  cp_async_wait<0>();\n  __syncthreads();\n", "  cp_async_wait<0>();\n", "race"),
    ("device/row_product.h", "cp_async_wait<kStages - 2>", "cp_async_wait<kStages - 1>", "async-copy"),
    ("device/row_product.h", "int now = 0, next = kStages - 1;", "int now = 0, next = 0;", "race|async-copy|numbers"),
    ("device/row_product.h", "at[i] = row < inside ?", "at[i] = row <= inside ?", "out-of-bounds"),
    ("device/row_product.h", "at[i] != nullptr && left > 0;", "at[i] != nullptr;", "out-of-bounds"),
    ("device/row_product.h", "i * mine.kApart < inside; }", "i * mine.kApart <= inside; }", "out-of-bounds"),
    ("device/row_product.h", "there = valid(i) && left > 0;", "there = valid(i);", "out-of-bounds"),
    ("device/row_product.h", "g.mask == nullptr || k + mine.first >= g.channels", "g.mask == nullptr", "out-of-bounds"),
    ("device/row_product.h", "written != nullptr && valid(i) && left > 0", "written != nullptr && left > 0",
     "out-of-bounds|race"),
    ("device/row_product.h", "row0 + row < rows ? width", "row0 + row <= rows ? width", "out-of-bounds"),
    ("device/row_product.h", "v < left ? from[v]", "v <= left ? from[v]", "out-of-bounds|numbers"),
    ("device/row_product.h", "rows - begin < Math::kRows ? rows - begin : Math::kRows", "Math::kRows", "out-of-bounds"),
    ("device/row_product.h", "    __syncthreads();  // the parts are whole\n", "", "race|uninitialised"),
    ("device/row_product.h", "    __syncthreads();  // everybody has read them\n", "", "race"),
    ("device/row_product.h", "  __syncthreads();  // the tile's values are those that were stored\n", "", "race"),
    ("device/row_product.h", "if (part != 0 || at.first + column >= columns)", "if (part != 0)", "out-of-bounds|race"),
    ("device/row_product.h", "row < at.inside; row += kParts) own", "row <= at.inside; row += kParts) own",
     "numbers|uninitialised|out-of-bounds"),
    ("device/row_math.h", "warp_row() + (lane() & 15)", "warp_row() + (lane() & 7)", "numbers"),
    ("device/row_math.h", "(of_right ^ k * 32) + j * 1024", "(of_right ^ k * 32) + j * 512", "numbers"),
    ("device/row_math.h", "(of_right ^ j * 16) + k * 2048", "(of_right ^ j * 16) + k * 1024", "numbers"),
    ("device/row_math.h", "k + (r >> 1) * 4;", "k + (r >> 1) * 2;", "numbers"),
    ("device/row_math.h", "byOutput ? b[j][d] : b[d][j]", "b[j][d]", "numbers"),
    ("device/ptx.h", "if (smem_bytes > 0) {", "if (smem_bytes > 48 * 1024) {", "static bytes of shared memory"),
    ("conv_stats.cu", "  __syncthreads();  // the sums are whole\n", "", "race"),
    ("conv_stats.cu", "if (channels_left > 0) {", "{", "out-of-bounds|race"),
    ("expand.cu", "  __syncthreads();  // the sums are whole\n", "", "race"),
    ("expand.cu", "if (first < p.channels) {", "{", "out-of-bounds|race"),
    ("expand.cu", "sums + kSumBytes<Math> / 4", "sums + kSumBytes<Math> / 8", "race|numbers"),
    ("expand_dgrad.cu", "  __syncthreads();  // the sums are whole\n", "", "race"),
    ("expand_dgrad.cu", "  if (left <= 0) return;\n", "", "out-of-bounds|race"),
    ("expand_dgrad.cu", "row < tile.inside; row", "row <= tile.inside; row", "out-of-bounds|race|uninitialised"),
    ("conv_backward.cu", "  __syncthreads();  // the sums are whole\n", "", "race"),
    ("conv_backward.cu", "  if (left <= 0) return;\n", "", "out-of-bounds|race"),
    ("conv_backward.cu", "tile.first == 0 ? dz : nullptr", "dz", "race"),
    ("device/sum.h", "(kWhole || i < left) && passes", "passes", "numbers"),
    ("device/row_product.h", "    if constexpr (Math::kWarpgroups) Math::settle();\n    __", "    __",
     "proxy|async-read"),
    ("device/row_product.h", "  if constexpr (Math::kWarpgroups) Math::settle();\n  cp", "  cp", "async-read|numbers"),
    ("device/row_math.h", "    fence_proxy_async();\n", "", "proxy"),
    ("device/row_math.h", "    wgmma_wait<0>();\n", "", "async-read"),
    ("device/row_math.h", "    wgmma_fence();\n", "", "async-read"),
    ("device/row_math.h", "byOutput ? 0 : Of::kDepth * kRowBytes", "0", "numbers"),
    ("device/row_math.h", "int(threadIdx.x) / 128 * 64 * kRowBytes", "0", "numbers"),
]  # fmt: skip


def everything():
    """Something of every kernel, on all shapes. For a process of its own."""
    found = []
    os.environ["RESFUSE_WGMMA"] = "0"
    for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, False), (torch.float32, True)):
        torch.backends.cudnn.allow_tf32 = tf32
        for case in CASES:
            found += [t for values in results(*case, dtype)[1].values() for t in values]
    os.environ["RESFUSE_WGMMA"] = "1"
    for case in (CASES[0], CASES[2]):
        found += [t for values in results(*case, torch.bfloat16)[1].values() for t in values]
    return [*found, mask_of_an_infinite_row()]


def mask_of_an_infinite_row():
    """Behind its last channel are products of infinity with nothing."""
    o = operands(*CASES[1], torch.float32)
    o["a"].z[0, 0, 0, 0] = float("inf")
    scale, shift, *_ = o["vectors"]
    return own("expand")(o["a"], o["weight"], scale, shift, Sum(o["residual"]), Want(mask=True)).mask


@EMULATED
def test_a_mask_ends_with_the_channels():
    with emulated():
        assert not (mask_of_an_infinite_row()[:, -1] >> CASES[1][1] % 8).any()


expected, test_a_bug_is_seen = seeded.tests(__name__, BUGS)
