"""The CUDA set's kernels run on a CPU: in any order of threads, reading what their files say, and no bug unseen."""

import pytest
import seeded
import torch
from units import EMULATED, activation, own

from resfuse.kernels import cuda, dispatch
from resfuse.kernels.cuda._ops import ops
from resfuse.kernels.interface import (
    PRIMITIVES,
    Activation,
    BNContext,
    BNGrad,
    Masked,
    Norm,
    RunningUpdate,
    Stats,
    Sum,
    Want,
    Window,
)
from resfuse.kernels.rounding import round_to_tf32
from resfuse.testing import comparison
from resfuse.testing.cases import CASES
from resfuse.testing.comparison import MODES
from resfuse.testing.cuda import emulated

pytestmark = [EMULATED, pytest.mark.usefixtures("exact")]
PRECISIONS = ["float32", "tf32", "bfloat16", "float16"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # whole tiles; a part of a tile; single channels; whole shares; shares of more rows than threads
    (3, 64, 5, 7), (2, 72, 9, 4), (1, 13, 40, 1), (2, 13, 8, 4), (1, 8, 260, 130),
]  # fmt: skip


def operands(shape, dtype):
    n, c, h, w = shape
    generator = torch.Generator().manual_seed(1)
    z, dout, residual = (activation(*shape, dtype=dtype, seed=seed) for seed in range(3))
    vectors = torch.rand(4, c, generator=generator) + 0.5
    mask = torch.randint(0, 256, (n * h * w, -(-c // 8)), generator=generator, dtype=torch.uint8)
    return z, dout, residual, mask, *vectors


def results(shape, dtype):
    """Something of every kernel, by name."""
    z, dout, residual, mask, mean, scale, shift, _ = operands(shape, dtype)
    window = Window((3, 3), (2, 2), (1, 1))
    recipe = Norm(z, scale, shift - 1)
    pooled, argmax = own("bn_relu_max_pool")(recipe, window)
    context = BNContext(mean, scale, shift, True)
    dz, dgamma, dbeta = own("bn_backward")(Masked(dout, mask), recipe, z, context)
    written = own("apply")(recipe, Sum(residual), Want(mask=True))
    below = recipe._replace(act=Activation("silu"))
    own("update_running")([])
    return {
        "bn_stats": own("bn_stats")(z), "apply": (written.out, written.mask), "bn_backward": (dgamma, dbeta),
        "bn_dgrad": own("bn_dgrad")(dz), "select": own("select")(Masked(dout, mask, None, 0.5)),
        "pool": (pooled, argmax),
        "pool backward": own("bn_relu_max_pool_backward")(pooled, argmax, recipe, window, context)[1:],
        "finalize": own("finalize")((mean, scale), shift, None, 1e-5), "bn_act": own("bn_act")(below),
        "bn_act backward": own("bn_act_backward")(dout, below, context),
        "bn_act, constants": own("bn_act_backward")(dout, below, context._replace(batch=False)),
    }  # fmt: skip


@pytest.mark.one_in(4)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_order_of_threads_gives_the_same_bits(shape, dtype):
    with emulated():
        expected = results(shape, dtype)
    for order in (1, 2):
        with emulated(order=order, seed=5):
            found = results(shape, dtype)
        for name, values in expected.items():
            pairs = zip(_tensors(found[name]), _tensors(values), strict=True)
            assert all(torch.equal(mine, theirs) for mine, theirs in pairs), name


def _tensors(value):
    return [value] if isinstance(value, torch.Tensor) else list(value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_traffic(shape, dtype):
    """Every activation is read once and every result written once."""
    z, dout, residual, mask, mean, scale, shift, slope = operands(shape, dtype)
    with emulated() as library:

        def read(*tensors):
            return all(library.traffic(t) == t.nbytes for t in tensors)

        def wrote(*tensors):
            return all(library.traffic(t, written=True) == t.nbytes for t in tensors)

        own("bn_stats")(z)
        assert read(z)
        written = own("apply")(Norm(z, scale, shift), Sum(residual), Want(mask=True))
        assert read(z, residual) and wrote(written.out, written.mask)
        out = own("bn_dgrad")(BNGrad(Masked(dout, mask), z, mean, scale, shift, slope, shift))
        assert read(dout, z, mask) and wrote(out)
        out = own("select")(Masked(dout, mask))
        assert read(dout, mask) and wrote(out)
        own("bn_reduce")(Masked(dout, mask), z, mean, scale)
        assert read(dout, z, mask)
        argmax = torch.zeros_like(dout, dtype=torch.uint8)
        assert wrote(ops().max_pool_backward(dout, argmax, dout, [1, 1], [1, 1], [0, 0], [1, 1]))
        assert read(dout, argmax)
        recipe = Norm(z, scale, shift, act=Activation("hardswish"))
        y = own("bn_act")(recipe)
        assert read(z) and wrote(y)
        dz, _, _ = own("bn_act_backward")(dout, recipe, BNContext(mean, scale, None, True))
        assert all(library.traffic(t) == 2 * t.nbytes for t in (dout, z)), "for the sums and for dz"
        assert wrote(dz)


# Pixels and channels: three shares, the last not full, and parts of tiles; one share, single channels; whole tiles.
PRODUCTS = [((1, 30, 23), 136, 64), ((3, 5, 7), 13, 20), ((2, 24, 11), 64, 128)]


def products(pixels, outer, inner, dtype):
    n, h, w = pixels
    generator = torch.Generator().manual_seed(3)
    dout, x = activation(n, outer, h, w, dtype=dtype, seed=1), activation(n, inner, h, w, dtype=dtype, seed=2)
    mask = torch.randint(0, 256, (n * h * w, -(-outer // 8)), generator=generator, dtype=torch.uint8)
    scale, shift, mean, weight = (torch.rand(size, generator=generator) + 0.5 for size in (inner, inner, inner, n))
    g, a = Masked(dout, mask, weight, 0.5), Norm(x, scale, shift - 1)
    found = own("covariance")(a), own("expand_products")(g, a, mean, None)[:2]
    return g, a, mean, found


@pytest.mark.one_in(4)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("pixels, outer, inner", PRODUCTS)
def test_products(pixels, outer, inner, precision, monkeypatch):
    dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision == "tf32")

    def read(t):
        return round_to_tf32(t) if precision == "tf32" else t

    with emulated() as library:
        g, a, mean, ((centre, cov), (found, total)) = products(pixels, outer, inner, dtype)
        square = dtype != torch.float32 and inner > 64 and inner % 8 == outer % 8 == 0
        assert library.traffic(g.dout) == g.dout.nbytes * -(-inner // (128 if square else 64))
        assert library.traffic(a.z) == a.z.nbytes * -(-outer // (64 if dtype == torch.float32 else 128))
        assert library.stat("ldmatrix_cycles") == library.stat("ldmatrix"), "bank conflicts"
        assert bool(library.stat("ldmatrix")) == (dtype != torch.float32)
        assert bool(library.stat("mma")) == (precision != "float32")
        own("covariance")(a)
        columns = -(-inner // 64)
        again = library.traffic(a.z) - a.z.nbytes * columns  # the first rows of each share, whose mean float32 takes
        assert 0 < again <= 0.2 * a.z.nbytes * columns if dtype == torch.float32 else again == 0
        left, right = own("select")(g), own("apply")(a, Sum(), Want()).out
    for order in (1, 2):
        with emulated(order=order, seed=7):
            again = products(pixels, outer, inner, dtype)[3]
        pairs = zip((centre, cov, found, total), (*again[0], *again[1]), strict=True)
        assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    left = matrix(read(left))
    centred = matrix(read(right - mean[:, None, None])) if dtype == torch.float32 else matrix(right) - mean.double()
    right = matrix(read(right))
    covariance = torch.cov(right.T, correction=0)
    pairs = (found, left.T @ centred), (total, left.sum(0)), (centre, right.mean(0)), (cov, covariance)
    for ours, exactly in pairs:
        assert (ours.double() - exactly.view(ours.shape)).norm() <= 1e-6 * exactly.norm()


WITH_U = [((1, 30, 23), 256, 64), ((3, 5, 7), 136, 24), ((2, 24, 11), 64, 64)]  # whole and parts of tiles


def with_u(pixels, outer, inner, dtype):
    g, a, mean, _ = products(pixels, outer, inner, dtype)
    wg = torch.randn(outer, inner, generator=torch.Generator().manual_seed(4)).to(dtype)
    return g, a, wg, own("expand_products")(g, a, mean, wg)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("pixels, outer, inner", WITH_U)
def test_u_comes_in_the_pass_of_the_products(pixels, outer, inner, dtype):
    with emulated() as library:
        g, a, wg, found = with_u(pixels, outer, inner, dtype)
        assert all(library.traffic(t) == t.nbytes for t in (g.dout, g.mask, a.z))
        assert library.traffic(found[2], written=True) == found[2].nbytes and found[2].dtype == dtype
        assert library.stat("ldmatrix_cycles") == library.stat("ldmatrix"), "bank conflicts"
        exactly = matrix(own("select")(g)) @ wg.double()
        alone = products(pixels, outer, inner, dtype)[3][1]
    for order in (1, 2):
        with emulated(order=order, seed=7):
            again = with_u(pixels, outer, inner, dtype)[3]
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, again, strict=True))
    assert (matrix(found[2]) - exactly).norm() <= torch.finfo(dtype).eps / 2 * exactly.norm()
    assert all((mine - theirs).norm() <= 1e-6 * theirs.norm() for mine, theirs in zip(found[:2], alone, strict=True))


def test_u_is_left_where_a_block_cannot_hold_all_columns():
    with emulated():
        for outer, inner, dtype in ((264, 64, torch.bfloat16), (64, 72, torch.bfloat16), (12, 8, torch.bfloat16),
                                    (64, 64, torch.float32)):
            assert with_u((1, 4, 4), outer, inner, dtype)[3][2] is None


def matrix(t):
    return t.double().permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def test_many_shares():
    """More rows than the first share holds, the last share not full: the merging kernels."""
    z = activation(5, 8, 100, 70, dtype=torch.float32) + 10
    with emulated():
        mean, var = own("bn_stats")(z)
        dbeta, dgamma = own("bn_reduce")(z, z, mean, torch.ones(8))
    assert torch.allclose(mean, z.double().mean((0, 2, 3)).float(), rtol=1e-6)
    assert torch.allclose(var, z.double().var((0, 2, 3), correction=0).float(), rtol=1e-5)
    assert torch.allclose(dbeta, z.double().sum((0, 2, 3)).float(), rtol=1e-5)
    expected = (z.double() * (z.double() - z.double().mean((0, 2, 3), keepdim=True))).sum((0, 2, 3))
    assert torch.allclose(dgamma, expected.float(), rtol=1e-3)


def test_nan_and_inf():
    z = torch.tensor([float("nan"), float("inf"), -float("inf"), -1.0]).view(4, 1, 1, 1)
    z = z.expand(4, 8, 1, 1).contiguous(memory_format=torch.channels_last)
    one, none = torch.ones(8), torch.zeros(8)
    with emulated():
        written = own("apply")(Norm(z, one, none), Sum(), Want(mask=True))
        assert own("bn_stats")(z).mean.isnan().all()
        line = z.view(1, 4, 8, 1).permute(0, 2, 3, 1).contiguous(memory_format=torch.channels_last)
        pooled, argmax = own("bn_relu_max_pool")(Norm(line, one, none), Window((1, 4), (1, 1)))
    assert torch.equal(written.out[:, 0, 0, 0].nan_to_num(7.0, float("inf")), torch.tensor([7.0, float("inf"), 0, 0]))
    assert written.mask.flatten().tolist() == [255, 255, 0, 0]
    assert pooled.isnan().all() and argmax.eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_of_misaligned_tensors(dtype):
    """Whole channels whose memory begins between two accesses of 16 bytes: the values that aligned ones have."""
    shape = (2, 72, 9, 4)
    z, dy, *_, mean, scale, shift, _ = operands(shape, dtype)
    context = BNContext(mean, scale, None, True)

    def moved(t):
        n, c, h, w = t.shape
        rows = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(n, h, w, c).permute(0, 3, 1, 2)
        return rows.copy_(t)

    def found(z, dy):
        recipe = Norm(z, scale, shift - 1, act=Activation("relu6"))
        return own("bn_act")(recipe), *own("bn_act_backward")(dy, recipe, context)

    with emulated():
        expected = found(z, dy)
        for operand in ((moved(z), dy), (z, moved(dy)), (moved(z), moved(dy))):
            assert all(map(torch.equal, found(*operand), expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_scaled_in_float32_and_rounded_once(dtype):
    weight = torch.nn.Parameter(torch.randn(40, 24, generator=torch.Generator().manual_seed(6)).to(dtype))
    scale = torch.linspace(-2.0, 3.0, 40)
    found = own("scale_weight")(weight, scale)
    assert torch.equal(found, (weight.detach().float() * scale[:, None]).to(dtype)) and not found.requires_grad


def test_bad_operands_are_named():
    z, vector = activation(2, 8, 3, 3, dtype=torch.float32), torch.ones(8)
    with emulated():
        with pytest.raises(RuntimeError, match=r"shift must be contiguous of shape \[8\]"):
            ops().bn_dgrad(z, None, None, 1.0, z, vector, torch.ones(7), None, None, None)
        with pytest.raises(RuntimeError, match="z must be dense in channels_last"):
            ops().bn_stats(z.contiguous())
        with pytest.raises(RuntimeError, match="act must be the number of an activation, from 2 to 5, not 1"):
            ops().bn_act(z, vector, vector, 1, 0.0)
        with pytest.raises(RuntimeError, match=r"dy must have the shape \[2, 8, 3, 3\]"):
            ops().bn_act_backward(z[:1], z, vector, vector, 2, 0.1, vector, vector, True)
        with pytest.raises(TypeError, match="store float32, bfloat16 or float16, not Double"):
            ops().bn_stats(z.double())


@pytest.mark.parametrize("mode", ["float32", "autocast-bfloat16"])
@pytest.mark.parametrize("name", ["small-projection", "ragged", "small-stem", "small-preact", "small-padded"])
def test_blocks(name, mode):
    """By the set alone."""
    import resfuse

    def fused(block):
        return resfuse.fuse(block, config=resfuse.FuseConfig(backend="cuda"))

    with emulated():
        comparison.check_case(CASES[name], fused, MODES[mode], range(5), kinks=False)


def test_it_has_every_primitive_where_it_can_run():
    assert set(cuda.PRIMITIVES) == set(PRIMITIVES)
    with emulated():
        assert dispatch.missing("cuda", "cpu", torch.float32) == []
    codes = {reason.code for reason in cuda.unsupported("cpu", torch.float64)}
    assert {"dtype", "device"} <= codes


# Seeded bugs -----------------------------------------------------------------------------------------------------

BUGS = [  # file, what stands there, what stands there instead, what the emulator or the numbers say
    ("bn_stats.cu", "if (row + u * kDown < place.end) raw", "if (row + u * kDown <= place.end) raw", "out-of-bounds"),
    ("bn_stats.cu", "  __syncthreads();\n  const int column", "  const int column", "race|uninitialised"),
    ("bn_stats.cu", "means, kDown * kColumns)", "means, kDown * kColumns - 1)", "out-of-bounds"),
    ("bn_stats.cu", "if (column < kColumns && channel < channels)", "if (column < kColumns)", "out-of-bounds|race"),
    ("bn_stats.cu", "share < shares; share += kMergeLanes)\n      total",
     "share <= shares; share += kMergeLanes)\n      total", "out-of-bounds|numbers"),
    ("bn_reduce.cu", "share < shares; share", "share <= shares; share", "out-of-bounds|numbers"),
    ("device/shares.h", "scratch[down * kColumns + across * kVector + i] = sums[which][i];\n    __syncthreads();",
     "scratch[down * kColumns + across * kVector + i] = sums[which][i];", "race|uninitialised"),
    ("device/shares.h", "= total;\n    }\n    __syncthreads();", "= total;\n    }", "race|uninitialised"),
    ("device/shares.h", "    __syncthreads();  // what is added next is whole\n", "", "race|uninitialised"),
    ("device/shares.h", "  __syncthreads();  // the sums are whole\n", "", "race|uninitialised"),
    ("device/shares.h", "  __syncthreads();  // everybody has read them\n", "", "race"),
    ("device/rows.h", "raw.v[i] = i < left ? at[i] : Stored", "raw.v[i] = i <= left ? at[i] : Stored", "out-of-bounds"),
    ("device/rows.h", "      if (i < left) at[i] = raw.v[i];\n  }\n}\n\n// The same",
     "      at[i] = raw.v[i];\n  }\n}\n\n// The same", "out-of-bounds|race"),
    ("device/rows.h", "end(int(begin + rows_each < rows ? begin + rows_each : rows))", "end(int(begin + rows_each))",
     "out-of-bounds"),
    ("device/gradient.h", "(row) * ((g.channels + 7) / 8) + first / 8]", "(row) * (g.channels / 8) + first / 8]",
     "numbers|out-of-bounds"),
    ("apply.cu", "if (left <= 0) return;", "", "out-of-bounds|race"),
    ("apply.cu", "if (row >= place.end) break;\n      main", "main", "out-of-bounds"),
    ("bn_relu_max_pool.cu", "column + s * pool.across < pool.width", "column + s * pool.across <= pool.width",
     "out-of-bounds|numbers"),
    ("bn_relu_max_pool.cu", "line + r * pool.apart < pool.height", "true", "out-of-bounds|numbers"),
    ("bn_relu_max_pool.cu", "return begin < 0 ? (-begin + apart - 1) / apart : 0;", "return 0;",
     "out-of-bounds|numbers"),
    ("bn_relu_max_pool.cu", "p < pool.out_height; ++p", "p <= pool.out_height; ++p", "out-of-bounds"),
    ("finalize.cu", "  if (c >= channels) return;\n", "", "out-of-bounds"),
    ("finalize.cu", "    __syncthreads();  // everybody", "    //", "race"),
    ("device/outer_product.h", "    __syncthreads();  // the tiles are whole; and everybody", "    // everybody",
     "race|async-copy|uninitialised"),
    ("device/outer_product.h", "    cp_async_wait<kStages - 2>();\n", "    cp_async_wait<kStages - 1>();\n",
     "async-copy"),
    ("device/outer_product.h", "    cp_async_commit();\n", "", "async-copy"),
    ("device/outer_product.h", "valid = row + i * kApart < inside && left > 0;", "valid = left > 0;",
     "out-of-bounds|numbers"),
    ("device/outer_product.h", "const bool valid = row + i * kApart < inside && left > 0;",
     "const bool valid = row + i * kApart < inside;", "out-of-bounds"),
    ("device/outer_product.h", "words[0][j] = valid ? words[0][j] : 0u;", ";", "numbers"),
    ("device/outer_product.h", "= valid ? Math::read(value, pivot[c], tf32) : 0.0f;",
     "= Math::read(value, pivot[c], tf32);", "numbers"),
    ("device/outer_product.h", "    left.load_bits(steps.inside(step + 1));\n", "", "numbers"),
    ("device/outer_product.h", "      tile.advance_bits(kApart);\n", "", "numbers"),
    ("device/product_math.h", "    __syncthreads();  // the stages have been read\n", "", "race"),
    ("device/product_math.h", "chunks.sums[j];\n    __syncthreads();", "chunks.sums[j];", "race|uninitialised"),
    ("device/product_math.h", "= sum;\n    }\n    __syncthreads();", "= sum;\n    }", "race|uninitialised"),
    ("device/outer_product.h", "int now = 0, next = kStages - 1;", "int now = 0, next = 0;", "race|async-copy|numbers"),
    ("device/product_math.h", "+ offset(lane() & 15,", "+ offset(lane() & 7,", "numbers"),
    ("device/product_math.h", "of_fragment[8] += d[2]", "of_fragment[8] += d[1]", "numbers"),
    ("device/product_math.h", "if ((lane() & 3) == 0) of_fragment", "of_fragment", "race"),
    ("device/product_math.h", "    __syncthreads();\n    const int column", "    const int column", "race"),
    ("device/product_math.h", "word(right, k + h * 4", "word(right, k + h * 2", "numbers"),
    ("device/product_math.h", "words(a + 4, left, k, Sums::row(0) + 4)", "words(a + 4, left, k, Sums::row(0))",
     "numbers"),
    ("device/outer_product.h", "  cp_async_wait<0>();\n  chunks", "  chunks", "async-copy"),
    ("device/outer_product.h", "    chunks.sums[j] = 0.0f;\n", "", "numbers"),
    ("device/outer_product.h", "smem + (Math::kStages - 1) * kStageBytes<Math>;", "smem;", "race"),
    ("expand_products.cu", "  __syncthreads();  // the vectors and totals are whole\n  if", "  if",
     "race|uninitialised"),
    ("expand_products.cu", "const bool valid = k < K && c", "const bool valid = c", "out-of-bounds|uninitialised"),
    ("expand_products.cu", "if (r < steps.inside(step) && c < C) store", "if (c < C) store", "out-of-bounds|race"),
    ("expand_products.cu", "if (k < K && c < C) products", "if (c < C) products", "out-of-bounds|race"),
    ("expand_products.cu", "if (column < K) sums", "sums", "out-of-bounds|race"),
    ("expand_products.cu", "if (k0 + column < g.channels) sums", "sums", "out-of-bounds|race"),
    ("expand_products.cu", "  if (dtype == DType::kFloat) mean = nullptr;\n", "", "numbers"),
    ("expand_products.cu", "if (k < g.channels && c < a.x.channels)", "if (k < g.channels)", "out-of-bounds|race"),
    ("expand_products.cu", "  __syncthreads();\n  if (lane != 0", "  if (lane != 0", "race|uninitialised"),
    ("expand_products.cu", "share < shares; share += kLanes", "share <= shares; share += kLanes",
     "out-of-bounds|numbers"),
    ("covariance.cu", "  __syncthreads();  // the vectors and totals are whole\n", "", "race|uninitialised"),
    ("covariance.cu", "    if (both) centre(right, smem, steps);\n", "", "numbers"),
    ("covariance.cu", "    if (r0 + column >= channels) return;\n", "", "out-of-bounds|race"),
    ("covariance.cu", "if (r < channels && c < channels)", "if (r < channels)", "out-of-bounds|race"),
    ("covariance.cu", "  __syncthreads();\n  if (lane != 0", "  if (lane != 0", "race|uninitialised"),
    ("covariance.cu", "if (r / tile > c / tile)", "if (false)", "uninitialised"),
    ("bn_act.cu", "if (row < place.end) raw", "if (row <= place.end) raw", "out-of-bounds"),
    ("bn_act.cu", "  if (left <= 0) return;\n", "", "out-of-bounds|race"),
    ("bn_act.cu", "      if (row >= place.end) break;\n", "", "out-of-bounds|race|uninitialised"),
    ("device/gradient.h", "  if (place.first < g.channels) {", "  {", "out-of-bounds"),
    ("device/gradient.h", "      if (row >= place.end) break;\n", "", "out-of-bounds|race|uninitialised|numbers"),
    ("device/gradient.h", "if (first + u * kDown < place.end) raw", "if (first + u * kDown <= place.end) raw",
     "out-of-bounds"),
    ("device/gradient.h", "if (which < 2 && channel < g.channels)", "if (which < 2)", "out-of-bounds|race"),
    ("device/gradient.h", "if (which < 2 && channel < g.channels)", "if (channel < g.channels)",
     "out-of-bounds|race|uninitialised"),
    ("device/gradient.h", "  if (left <= 0) return;\n", "", "out-of-bounds|race"),
    ("bn_act_backward.cu", "  if (batch) g.mean_dy", "  g.mean_dy", "numbers"),
    ("bn_act_backward.cu", "  if (error == cudaSuccess) error = add_shares", "  if (false) error = add_shares",
     "uninitialised|never written"),
    ("bn_reduce.cu", "if (results.bn_scale != nullptr) results", "results", "out-of-bounds|null|Segmentation"),
]  # fmt: skip
SAMPLE = (21,)  # a quick one


def everything():
    """Something of every kernel, on all shapes."""
    torch.manual_seed(0)
    found = []
    for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, False), (torch.float32, True)):
        torch.backends.cudnn.allow_tf32 = tf32
        for case in PRODUCTS:
            found += [t for pair in products(*case, dtype)[3] for t in pair]
    found += with_u((1, 30, 23), 136, 24, torch.bfloat16)[3]
    for shape in SHAPES:
        found += [t for v in results(shape, torch.float32).values() for t in _tensors(v)]
    mean, var, count = torch.zeros(300), torch.ones(300), torch.tensor(3)
    stats = Stats(torch.randn(300), torch.rand(300))
    own("update_running")([RunningUpdate(stats, 40, mean, var, count, None)])
    return [*found, mean, var, count]


expected, test_a_bug_is_seen = seeded.tests(__name__, BUGS, SAMPLE)
