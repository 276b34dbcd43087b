"""Every kernel set's primitives, one by one, against the formulas written plainly in float64."""

import importlib
from contextlib import nullcontext

import pytest
import torch
from operands import DTYPES, close, masked, matrix, norm_of, primitive, residuals, tensor, vector, weight
from units import CUDA, EMULATED, NATIVE, TRITON, activation, triton_kernels

from resfuse.kernels.eager import _rows
from resfuse.kernels.interface import (
    Affine,
    BNContext,
    BNGrad,
    Geometry,
    Masked,
    Norm,
    Padded,
    RunningUpdate,
    Stats,
    Strided,
    Sum,
    Summed,
    Want,
    Window,
)
from resfuse.testing.cuda import emulated, on_gpu

SHAPES = [(1, 1, 1, 1), (2, 7, 3, 5), (3, 16, 4, 4), (1, 65, 9, 7)]  # N, C, H, W
pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.one_in(10, kernel_set="triton")]  # interpreted


STORED = {
    "eager": tuple(DTYPES), "cpu": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16), "cuda": (torch.float32, torch.bfloat16, torch.float16),
}  # fmt: skip


@pytest.fixture(
    autouse=True,
    params=[
        "eager", "eager, many parts", pytest.param("cpu", marks=NATIVE), pytest.param("triton", marks=TRITON),
        pytest.param("triton, windows", marks=[TRITON, pytest.mark.slow]),
        pytest.param("triton, gpu", marks=[TRITON, pytest.mark.gpu]), pytest.param("cuda", marks=EMULATED),
        pytest.param("cuda, gpu", marks=[CUDA, pytest.mark.gpu]),
    ],  # fmt: skip
)
def kernel_set(request, monkeypatch):
    name, _, how = request.param.partition(", ")
    monkeypatch.setitem(_rows._PART_ELEMENTS, "cpu", 40 if how == "many parts" else 1 << 19)
    monkeypatch.setattr(primitive, "kernel_set", name)
    if how == "windows" and "conv" not in request.node.name:
        pytest.skip("windows: these kernels are of convolutions alone")
    if name == "cuda":
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    windows = how in ("windows", "gpu")
    way = {
        "triton": lambda: triton_kernels(monkeypatch, gpu=how == "gpu", windows=windows),
        "cuda": on_gpu if how == "gpu" else emulated,
    }.get(name, nullcontext)
    with way():
        yield name


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request, kernel_set):
    if request.param not in STORED[kernel_set]:
        pytest.skip(f"dtype: the kernel set {kernel_set} does not store {request.param}")
    return request.param


@pytest.fixture(params=SHAPES, ids=str)
def shape(request):
    return request.param


def test_prepare(shape, dtype):
    recipe, expected = norm_of(shape, dtype)
    close(matrix(tensor(primitive("prepare")(recipe))), expected, dtype)
    grad, expected = masked(shape, dtype)
    assert torch.equal(matrix(tensor(primitive("prepare")(grad))), expected)
    x = activation(*shape)
    assert primitive("prepare")(x) is x


def test_masked_infinity_is_zero():
    dout = torch.full((1, 8, 1, 1), float("inf"))
    g = primitive("select")(Masked(dout, torch.tensor([[0b00000101]], dtype=torch.uint8)))
    assert g.flatten().tolist() == [float("inf"), 0, float("inf"), 0, 0, 0, 0, 0]


def test_bn_stats(shape, dtype):
    z = activation(*shape, dtype=dtype) + 30
    mean, var = primitive("bn_stats")(z)
    exact = DTYPES[torch.float64 if dtype == torch.float64 else torch.float32]
    assert torch.allclose(mean.double(), matrix(z).mean(0), rtol=4 * exact)
    assert torch.allclose(var.double(), matrix(z).var(0, correction=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [0.1, 3.3e4, -1e-3])
def test_a_constant_channel_has_no_variance(value, dtype):
    """But for rounding, which may not take it below 0: its root would be NaN where eps is."""
    n = 1 if primitive.kernel_set == "triton" else 3  # interpreted: seconds
    z = torch.full((n, 5, 37, 29), value, dtype=torch.float64).to(dtype).contiguous(memory_format=torch.channels_last)
    var = primitive("bn_stats")(z).var
    assert (0 <= var).all() and (var <= (1e-4 * value) ** 2).all()


def test_finalize(dtype):
    wide = vector(5, dtype).dtype
    stats, gamma, beta = Stats(vector(5, dtype), vector(5, dtype).abs()), vector(5, dtype, 1), vector(5, dtype, 2)
    scale, shift, invstd = primitive("finalize")(stats, gamma.to(dtype), beta.to(dtype), 1e-3)
    assert scale.dtype == shift.dtype == wide
    expected = gamma.to(dtype).double() / (stats.var.double() + 1e-3).sqrt()
    assert torch.allclose(scale.double(), expected, rtol=1e-5)
    assert torch.allclose(shift.double(), beta.to(dtype).double() - stats.mean.double() * expected, atol=1e-5)
    assert torch.equal(primitive("finalize")(stats, None, None, 1e-3).scale, invstd)


GEOMETRIES = [
    (1, Geometry((1, 1), (0, 0), (1, 1), 1)), (3, Geometry((2, 1), (1, 1), (1, 1), 1)),
    (3, Geometry((1, 1), (2, 2), (2, 2), 2)), (1, Geometry((2, 2), (0, 0), (1, 1), 1)),
    (3, Geometry((1, 1), (1, 1), (1, 1), 1)), (3, Geometry((1, 1), (2, 1), (2, 1), 1)),
    (2, Geometry((1, 1), (0, 0), (1, 1), 1)), (3, Geometry((1, 1), (3, 3), (1, 1), 1)),
    (3, Geometry((2, 2), (1, 1), (1, 1), 1)), (4, Geometry((2, 3), (1, 1), (1, 1), 1)),
    (3, Geometry((2, 3), (1, 1), (2, 1), 1)),
]


@pytest.mark.parametrize("channels, outputs", [(6, 8), (20, 72)], ids=["few channels", "channels"])
@pytest.mark.parametrize("kernel, geometry", GEOMETRIES)
def test_conv_stats_and_conv_backward(kernel, geometry, channels, outputs, dtype):
    recipe, y = norm_of((2, channels, 5, 7), dtype)
    inner = channels // geometry.groups
    filters = weight(outputs, inner * kernel**2, dtype).view(outputs, inner, kernel, kernel) / kernel
    leaf = y.view(2, 5, 7, channels).permute(0, 3, 1, 2).requires_grad_()
    filters64 = filters.double().requires_grad_()
    expected = torch.nn.functional.conv2d(leaf, filters64, None, *geometry)
    z, stats = primitive("conv_stats")(recipe, filters, geometry, stats=True)
    assert z.dtype == dtype and z.is_contiguous(memory_format=torch.channels_last)
    close(z, expected.detach(), dtype)
    exact = torch.float32 if dtype != torch.float64 else dtype
    close(stats.mean, matrix(z).mean(0), exact)
    close(stats.var, matrix(z).var(0, correction=0), exact)
    assert primitive("conv_stats")(recipe, filters, geometry, stats=False)[1] is None

    dz = activation(*expected.shape, dtype=dtype, seed=9)
    da, dfilters = torch.autograd.grad(expected, (leaf, filters64), dz.double())
    add = activation(2, channels, 5, 7, dtype=dtype, seed=11)
    ours, dweight = primitive("conv_backward")(dz, recipe, filters, geometry, add, (True, True))
    close(ours, da + add.double(), dtype)
    close(dweight, dfilters, dtype)
    strided = Strided(add[:, :, ::2, ::3], (2, 3))
    expected_add = torch.zeros_like(da)
    expected_add[:, :, ::2, ::3] = add[:, :, ::2, ::3].double()
    ours, _ = primitive("conv_backward")(dz, recipe, filters, geometry, strided, (True, False))
    close(ours, da + expected_add, dtype)
    assert primitive("conv_backward")(dz, recipe, filters, geometry, None, (False, True))[0] is None


def test_covariance(shape, dtype):
    recipe, y = norm_of(shape, dtype)
    mean, cov = primitive("covariance")(recipe)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    close(mean, y.mean(0), exact)
    close(cov, (y - y.mean(0)).T @ (y - y.mean(0)) / len(y), exact)


def test_covariance_keeps_digits_where_means_are_large():
    """Channel means of 30 standard deviations: centring first keeps what an uncentred Gram matrix loses."""
    y = activation(8, 6, 32, 32, dtype=torch.float32) + 30
    _, cov = primitive("covariance")(y)
    rows = matrix(y)
    exact = (rows - rows.mean(0)).T @ (rows - rows.mean(0)) / len(rows)
    uncentred = rows.float().T @ rows.float() / len(rows) - rows.float().mean(0)[:, None] * rows.float().mean(0)
    error = (cov.double() - exact).norm() / exact.norm()
    assert error < 3e-6 < (uncentred.double() - exact).norm() / exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_covariance_of_16_bits_where_means_are_large(dtype):
    """Means of 30 standard deviations cost no more than a rounding of the values does."""
    if dtype not in STORED[primitive.kernel_set]:
        pytest.skip(f"dtype: the kernel set {primitive.kernel_set} does not store {dtype}")
    y = (activation(2, 6, 32, 32, dtype=torch.float32) + 30).to(dtype)
    _, cov = primitive("covariance")(y)
    rows = matrix(y)
    exact = (rows - rows.mean(0)).T @ (rows - rows.mean(0)) / len(rows)
    assert (cov.double() - exact).norm() / exact.norm() < torch.finfo(dtype).eps


def test_expand_stats_are_the_products_statistics(shape, dtype):
    recipe, y = norm_of(shape, dtype)
    w = weight(9, shape[1], dtype)
    mean, var = primitive("expand_stats")(w, *primitive("covariance")(recipe))
    z = y @ w.double().T
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    close(mean, z.mean(0), exact)
    close(var, z.var(0, correction=0), exact)
    assert (var >= 0).all()


@pytest.mark.parametrize("channels, count", [(8, 256), (64, 4096), pytest.param(3, 100_000, marks=pytest.mark.slow)])
def test_float32_variances_stay_within_their_condition(channels, count):
    """4 eps32 kappa channel by channel, for rectified inputs with means of their own."""
    from resfuse.testing.tolerances import check_variance, kappa

    if primitive.kernel_set in ("triton", "cuda") and count > 1000:
        pytest.skip("interpreted and emulated: minutes of it tell no more than the smallest size")
    for seed in range(5):
        offsets = 3 * torch.randn(1, channels, 1, 1, generator=torch.Generator().manual_seed(seed))
        y = (activation(1, channels, count, 1, dtype=torch.float32, seed=seed) + offsets).relu()
        w = weight(4 * channels, channels, torch.float32, seed)
        var = primitive("expand_stats")(w, *primitive("covariance")(y)).var
        cov = torch.cov(matrix(y).T, correction=0).reshape(channels, channels)
        exact = ((w.double() @ cov) * w.double()).sum(1)
        check_variance(f"seed {seed}", var, exact, kappa(w, cov, exact))


def test_a_variance_that_cancels_is_clamped_and_nan_is_kept():
    w, cov = torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, 1 + 1e-7], [1 + 1e-7, 1.0]])
    assert primitive("expand_stats")(w, torch.zeros(2), cov).var.item() == 0
    assert primitive("expand_stats")(w, torch.zeros(2), cov * float("nan")).var.isnan().all()


@pytest.mark.parametrize("kind", ["none", "tensor", "norm", "rectified", "second"])
def test_expand_and_apply(kind, shape, dtype):
    channels = 11
    out_shape = (shape[0], channels, *shape[2:])
    residual, value = residuals(out_shape, dtype)[kind]
    recipe, y = norm_of(shape, dtype)
    w, scale, shift = weight(channels, shape[1], dtype), vector(channels, dtype, 4), vector(channels, dtype, 5)
    out, mask, stats = primitive("expand")(recipe, w, scale, shift, Sum(residual), Want(mask=True, stats=True))
    close(matrix(out), (y @ w.double().T * scale.double() + shift.double() + value).relu(), dtype)
    check_mask(out, mask)
    if stats is not None:  # of what was stored
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        close(stats.mean, matrix(out).mean(0), exact)
        close(stats.var, matrix(out).var(0, correction=0), exact)
    assert primitive("expand")(recipe, w, scale, shift, Sum(residual), Want()).mask is None

    main, _ = norm_of(out_shape, dtype)
    expected = matrix(main.z) * main.scale.double() + main.shift.double() + value
    out, mask, _ = primitive("apply")(main, Sum(residual), Want(mask=True))
    close(matrix(out), expected.relu(), dtype)
    check_mask(out, mask)
    close(matrix(primitive("apply")(main, Sum(residual, relu=False), Want()).out), expected, dtype)


@pytest.mark.parametrize("kind", ["tensor", "norm", "second", "padded"])
def test_weighed_sums(kind, shape, dtype):
    """scale * (gate * row_scale * main + (1 - gate) * residual), by both primitives that write sums."""
    channels = 11
    out_shape = (shape[0], channels, *shape[2:])
    if kind == "padded":
        x = activation(shape[0], 5, *shape[2:], dtype=dtype, seed=26)
        residual, value = Padded(x, 2, channels), torch.nn.functional.pad(matrix(x), (2, 4))
    else:
        residual, value = residuals(out_shape, dtype)[kind]
    main, _ = norm_of(out_shape, dtype)
    linear = matrix(main.z) * main.scale.double() + main.shift.double()
    recipe, y = norm_of(shape, dtype)
    w, scale, shift = weight(channels, shape[1], dtype), vector(channels, dtype, 4), vector(channels, dtype, 5)
    product = y @ w.double().T * scale.double() + shift.double()
    row_scale = torch.rand(shape[0], dtype=main.scale.dtype) * 2
    rows = row_scale.double().repeat_interleave(shape[2] * shape[3])[:, None]
    gate = torch.rand(out_shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    gate = gate.contiguous(memory_format=torch.channels_last)
    t = matrix(gate)
    for total, expected in (
        (Sum(residual, relu=False, scale=0.6), lambda m: 0.6 * (m + value)),
        (Sum(residual, row_scale=row_scale), lambda m: (rows * m + value).relu()),
        (Sum(residual, scale=2.0, gate=gate), lambda m: (2 * (t * m + (1 - t) * value)).relu()),
        (Sum(residual, False, 0.5, row_scale, gate), lambda m: 0.5 * (t * rows * m + (1 - t) * value)),
    ):
        written = primitive("apply")(main, total, Want(mask=True))
        close(matrix(written.out), expected(linear), dtype)
        check_mask(written.out, written.mask)
        written = primitive("expand")(recipe, w, scale, shift, total, Want())
        close(matrix(written.out), expected(product), dtype)


def test_select(shape, dtype):
    dout, factors = activation(*shape, dtype=dtype), torch.rand(shape[0]) + 0.5
    passed = activation(*shape, seed=8) > 0
    mask = torch.zeros(matrix(dout).shape[0], -(-shape[1] // 8), dtype=torch.uint8)
    _rows.pack_mask(matrix(passed) > 0, mask)
    rows = factors.double().repeat_interleave(shape[2] * shape[3])[:, None]
    kept = torch.where(matrix(passed) > 0, matrix(dout), 0)
    close(matrix(primitive("select")(Masked(dout, mask))), kept, dtype)
    close(matrix(primitive("select")(Masked(dout, mask, factors.to(vector(1, dtype)), 0.5))), 0.5 * rows * kept, dtype)
    close(matrix(primitive("select")(Masked(dout, None, None, 3.0))), 3 * matrix(dout), dtype)


def test_select_masks_infinities_and_passes_nan():
    dout = torch.tensor([float("inf"), float("nan"), 1.0]).view(1, 3, 1, 1)
    found = primitive("select")(Masked(dout, torch.tensor([[0b110]], dtype=torch.uint8), None, 2.0)).flatten()
    assert found[0] == 0 and found[1].isnan() and found[2] == 2


WINDOWS = [Window((3, 3), (2, 2), (1, 1)), Window((2, 3), (1, 2), (0, 1), (1, 1), True), Window((2, 2), (2, 2))]


@pytest.mark.parametrize("window", WINDOWS, ids=["stem", "ceil", "even"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_pools(window, channels_last, dtype, kernel_set):
    """Forward and backward as torch's own on the stored activation; the places fit a byte."""
    if kernel_set != "eager" and not channels_last:
        pytest.skip("layout: that set reads channels_last")
    recipe, y = norm_of((2, 7, 9, 6), dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    recipe = recipe._replace(z=recipe.z.contiguous(memory_format=layout))
    stored = tensor(primitive("prepare")(recipe)).requires_grad_()
    expected = torch.nn.functional.max_pool2d(stored, *window)
    out, argmax = primitive("bn_relu_max_pool")(recipe, window)
    assert torch.equal(out, expected) and argmax.dtype == torch.uint8 and argmax.max() < window.size[0] * window.size[1]
    dout = activation(*out.shape, dtype=dtype, seed=3).contiguous(memory_format=layout)
    (dy,) = torch.autograd.grad(expected, stored, dout)
    invstd = vector(7, dtype, 2).abs()
    context = BNContext(vector(7, dtype, 1), invstd, recipe.scale / invstd, True)
    found = primitive("bn_relu_max_pool_backward")(dout, argmax, recipe, window, context)
    for ours, theirs in zip(found, primitive("bn_backward")(dy, recipe, recipe.z, context), strict=True):
        close(tensor(ours), tensor(theirs).double(), dtype)  # sums of overlapping windows are rounded later
    if "avg_pool" not in importlib.import_module(f"resfuse.kernels.{kernel_set}").PRIMITIVES:
        return
    size, stride, padding, _, ceil_mode = window
    average = torch.nn.functional.avg_pool2d(stored, size, stride, padding, ceil_mode, False)
    assert torch.equal(primitive("avg_pool")(recipe, window, False), average)
    (da,) = torch.autograd.grad(average, stored, dout)
    assert torch.equal(primitive("avg_pool_backward")(dout, recipe, window, False), da)


def check_mask(out, mask):
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(_rows.unpack_mask(mask, matrix(out)) != 0, ~(matrix(out) <= 0))


def test_mask_is_taken_of_the_rounded_values():
    """A positive sum that underflows in float16 is stored as 0, and passes no gradient."""
    z = torch.full((1, 8, 1, 1), 1e-3, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    out, mask, _ = primitive("apply")(Norm(z, torch.full((8,), 1e-6), torch.zeros(8)), Sum(), Want(mask=True))
    assert not out.any() and not mask.any()


def test_nan_keeps_its_bit():
    z = torch.tensor([float("nan"), float("inf"), -float("inf"), -1.0]).view(1, 4, 1, 1)
    out, mask, _ = primitive("apply")(Norm(z, torch.ones(4), torch.zeros(4)), Sum(), Want(mask=True))
    assert out.flatten()[0].isnan() and out.flatten()[1:].tolist() == [float("inf"), 0, 0]
    assert mask.tolist() == [[0b0011]]


@pytest.mark.parametrize("centred", [True, False])
def test_backward_by_expand_products(centred, shape, dtype):
    """expand_products, expand_coefficients and expand_dgrad together are autograd's gradients of the BatchNorm of a
    product; frozen statistics are the uncentred case."""
    channels = 9
    recipe, y = norm_of(shape, dtype)
    g_recipe, g = masked((shape[0], channels, *shape[2:]), dtype)
    w, scale = weight(channels, shape[1], dtype), vector(channels, dtype, 4)
    affine = Affine(scale, vector(channels, dtype, 5), vector(channels, dtype, 6).abs() + 0.1)
    wg = primitive("scale_weight")(w, scale)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert wg.dtype == dtype
    close(wg, w.double() * scale.double()[:, None], dtype)

    mean, cov = primitive("covariance")(recipe) if centred else (None, None)
    products, total, u = primitive("expand_products")(g_recipe, recipe, mean, wg)
    expected = g.T @ (y - mean.double() if centred else y)
    assert products.dtype == total.dtype == exact
    close(products, expected, exact)
    close(total, g.sum(0), exact)
    if u is not None:
        close(matrix(u), g @ wg.double(), u.dtype)
    assert primitive("expand_products")(g_recipe, recipe, mean, None)[2] is None

    q = q_scale = c = None
    count, da = len(y), g @ wg.double()
    if centred:
        dgamma, dweight, q, q_scale, c = primitive("expand_coefficients")(
            products, total, w, wg, mean, cov, affine, count
        )
        inv, s, w64 = affine.invstd.double(), scale.double(), w.double()
        expected_dgamma = inv * (expected * w64).sum(1)
        close(dgamma, expected_dgamma, exact)
        close(dweight, s[:, None] * (expected - (expected_dgamma * inv)[:, None] * (w64 @ cov.double())), exact)
        full = w64.T @ (w64 * (s * inv * expected_dgamma / count)[:, None])
        assert q.dtype == dtype and (1 <= q.abs().max() <= 2 or not full.any())
        assert q_scale.log2().frac() == 0, "scaling is exact"
        largest = max(full.abs().max().item(), 1e-300)
        close(q_scale.double() / largest * q.double(), full / largest, dtype)
        close(c, g.sum(0) / count @ wg.double() - mean.double() @ q.double() * q_scale, exact)
        da = da - y @ q.double() * q_scale - c.double()
    below = vector(shape[1], dtype, 8)
    for relu, given in ((True, u), (False, u), (True, None), (False, None)):
        expected_da = da * (y > 0) if relu else da
        operands = g_recipe, given, recipe, wg, q, q_scale, c, relu
        close(matrix(primitive("expand_dgrad")(*operands, None)), expected_da, dtype)
        found = primitive("expand_dgrad")(*operands, below)
        if isinstance(found, Summed):
            found, sums = found
            stored, centred = matrix(found), matrix(recipe.z) - below.double()
            close(sums.sum(0), torch.stack([stored.sum(0), (stored * centred).sum(0)]), exact)
        close(matrix(found), expected_da, dtype)


@pytest.mark.parametrize("batch", [True, False], ids=["batch", "constant"])
@pytest.mark.parametrize("relu", [True, False])
def test_bn_backward(batch, relu, dtype):
    shape = (3, 10, 4, 5)
    recipe, y = norm_of(shape, dtype)
    z, dy = recipe.z, activation(*shape, dtype=dtype, seed=31)
    stats = primitive("bn_stats")(z) if batch else Stats(vector(10, dtype, 8), vector(10, dtype, 9).abs() + 0.5)
    invstd = (stats.var + 1e-5).rsqrt()
    gamma = recipe.scale / invstd
    context = BNContext(stats.mean, invstd, gamma, batch)
    dz, dgamma, dbeta = primitive("bn_backward")(dy, recipe if relu else None, z, context)

    if not relu:
        parts = torch.stack([matrix(dy), matrix(dy) * (matrix(z) - stats.mean.double())], 1).view(2, -1, 2, 10).sum(1)
        summed = primitive("bn_backward")(Summed(dy, parts.to(invstd.dtype)), None, z, context)
        close(summed[1], dgamma.double(), dtype)
        close(summed[2], dbeta.double(), dtype)
    g = matrix(dy) * (y > 0) if relu else matrix(dy)
    zhat = (matrix(z) - stats.mean.double()) * invstd.double()
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    close(dbeta, g.sum(0), exact)
    close(dgamma, (g * zhat).sum(0), exact)
    scale = (gamma * invstd).double()
    expected = scale * (g - g.mean(0) - zhat * (g * zhat).mean(0)) if batch else scale * g
    close(matrix(tensor(dz)), expected, dtype)
    if not relu:
        sums = primitive("bn_reduce")(dy, z, stats.mean, invstd)
        assert torch.equal(sums[0], dbeta) and torch.equal(sums[1], dgamma)
        if batch:
            slope = (dgamma * invstd / len(g)).to(invstd.dtype)
            recipe = BNGrad(dy, z, stats.mean, gamma * invstd, dbeta / len(g), slope)
            close(matrix(primitive("bn_dgrad")(recipe)), expected, dtype)
            close(matrix(tensor(primitive("prepare")(recipe))), expected, dtype)


def test_update_running_as_torch_does(dtype):
    z = activation(2, 6, 3, 3, dtype=torch.float64)
    for momentum in (0.1, None):
        torch_norm = torch.nn.BatchNorm2d(6, momentum=momentum).double()
        mean, var, tracked = torch.zeros(6, dtype=dtype), torch.ones(6, dtype=dtype), torch.tensor(0)
        for step in range(3):
            torch_norm(z + step)
            stats = Stats((matrix(z) + step).mean(0), matrix(z).var(0, correction=0))
            primitive("update_running")([RunningUpdate(stats, 18, mean, var, tracked, momentum)])
        assert tracked == 3 and mean.dtype == dtype
        close(mean, torch_norm.running_mean, dtype)
        close(var, torch_norm.running_var, dtype)


@pytest.mark.parametrize("batch", [True, False], ids=["batch", "constant"])
@pytest.mark.parametrize("relu", [True, False])
def test_gradient_recipes(batch, relu, shape, dtype):
    """BNGrad of a masked and weighed dy, under the ReLU of its own z, as a tensor and as an operand of a 1x1."""
    g, _ = masked(shape, dtype)
    factors = (torch.rand(shape[0]) + 0.5).to(vector(1, dtype).dtype)
    g = g._replace(row_scale=factors, scale=0.5)
    dy = matrix(primitive("select")(g))
    recipe, y = norm_of(shape, dtype)
    mean, mean_dy, slope = (vector(shape[1], dtype, seed) for seed in (41, 42, 43))
    if relu:
        dy = dy * (y > 0)
    expected = dy * recipe.scale.double()
    if batch:
        expected = recipe.scale.double() * (dy - mean_dy - (matrix(recipe.z) - mean) * slope)
    grad = BNGrad(
        g, recipe.z, mean, recipe.scale, mean_dy if batch else None, slope if batch else None,
        recipe.shift if relu else None,
    )
    dz = primitive("bn_dgrad")(grad)
    close(matrix(dz), expected, dtype)
    filters, x = weight(shape[1], 10, dtype), activation(shape[0], 10, *shape[2:], dtype=dtype, seed=44)
    geometry = Geometry((1, 1), (0, 0), (1, 1), 1)
    da, dfilters = primitive("conv_backward")(grad, x, filters[:, :, None, None], geometry, None, (True, True))
    close(matrix(da), matrix(dz) @ filters.double(), dtype)
    close(dfilters.flatten(1), matrix(dz).T @ matrix(x), dtype)


def test_constant_statistics_let_no_nan_of_z_pass():
    nan = torch.full((1, 8, 1, 1), float("nan"))
    one = torch.ones(8)
    dz = primitive("bn_dgrad")(BNGrad(torch.ones(1, 8, 1, 1), nan, one, 2 * one, None, None))
    assert torch.equal(dz, torch.full((1, 8, 1, 1), 2.0))
