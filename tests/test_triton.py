"""The Triton set beyond single primitives: whole blocks interpreted, its refusals, and the tools that check it."""

import copy

import pytest
import torch
from units import activation, bn, conv, conv_bn, triton_kernels
from units import bottleneck as random_bottleneck

import resfuse
from resfuse.functional import bottleneck, conv_bn_add_relu, preactivation
from resfuse.functions import cost
from resfuse.kernels import dispatch, measured
from resfuse.kernels.interface import Activation, BNContext, Geometry, Masked, Norm, Stats, Sum, Unsupported, Want
from resfuse.kernels.rounding import round_to_tf32
from resfuse.kernels.triton import unavailable
from resfuse.testing import cases, comparison
from resfuse.testing.comparison import MODES
from resfuse.testing.tolerances import relative_error

if unavailable():
    pytest.skip(": ".join(unavailable()[0]), allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from resfuse.kernels.triton import _table  # noqa: E402
from resfuse.kernels.triton._launch import launch  # noqa: E402
from resfuse.kernels.triton._moments import fewer_shares, merge_moments  # noqa: E402
from resfuse.kernels.triton._operands import View  # noqa: E402
from resfuse.kernels.triton._tiles import row_starts  # noqa: E402
from resfuse.kernels.triton.apply import apply  # noqa: E402
from resfuse.kernels.triton.bn_act import bn_act  # noqa: E402
from resfuse.kernels.triton.bn_act_backward import bn_act_backward  # noqa: E402
from resfuse.kernels.triton.conv_stats import conv_stats  # noqa: E402
from resfuse.kernels.triton.covariance import covariance  # noqa: E402
from resfuse.kernels.triton.select import select  # noqa: E402

POINTWISE = Geometry((1, 1), (0, 0), (1, 1), 1)
BLOCKS = (
    "small-identity", "small-strided", "small-v1-stride", "small-bias", "odd-projection", "wide-inside",
    "small-basic-strided", "small-pooled", "small-padded", "small-scaled", "small-preact-bottleneck",
    "small-dense-layer", "small-stem",
)  # fmt: skip
DEVICES = [False, pytest.param(True, marks=pytest.mark.gpu)]


def fuse(module):
    return resfuse.fuse(module, config=resfuse.FuseConfig(backend="triton"))


def check(name, mode):
    try:
        comparison.check_case(cases.CASES[name], fuse, MODES[mode], range(3), kinks=False)
    except AssertionError:  # medians of few seeds stray: what they find is asked of more
        comparison.check_case(cases.CASES[name], fuse, MODES[mode], range(20), kinks=False)


@pytest.fixture(params=DEVICES, ids=["interpreted", "gpu"])
def runner(request, monkeypatch):
    with triton_kernels(monkeypatch, gpu=request.param) as running:
        yield running


@pytest.mark.one_in(40, runner=False)
@pytest.mark.parametrize("mode", ["float32", "autocast-bfloat16", "autocast-float16"])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_as_exact_as_eager(name, mode, runner):
    check(name, mode)
    wide = {"_covariance", "_expand", "_outer_product", "_expand_dgrad"}
    assert wide <= set(runner.launches) if name == "small-identity" else runner.launches


WINDOWS = [f"small-{name}" for name in ("strided", "identity", "dilated", "groups", "basic-strided", "preact")]


@pytest.mark.slow
@pytest.mark.parametrize("gpu", DEVICES, ids=["interpreted", "gpu"])
@pytest.mark.parametrize("mode", ["autocast-bfloat16", "float32", "autocast-float16"])
@pytest.mark.parametrize("name", WINDOWS)
def test_blocks_whose_windows_are_ours(name, mode, gpu, monkeypatch):
    """3x3 convolutions and their gradients by our kernels, which nothing chooses yet."""
    with triton_kernels(monkeypatch, gpu=gpu, windows=True) as running:
        check(name, mode)
    assert {"_conv_window", "_conv_window_dgrad", "_conv_window_wgrad"} <= set(running.launches)


@pytest.mark.parametrize(
    "rows", [1, pytest.param(10**9, marks=pytest.mark.slow)], ids=["covariance", "recomputed"]
)
@pytest.mark.parametrize(
    "name",
    ["small-identity", *(pytest.param(f"small-{n}", marks=pytest.mark.slow) for n in ("strided", "preact-bottleneck"))],
)
def test_blocks_whose_recipes_are_written_first(name, rows, runner, monkeypatch):
    """As on a GPU where that was measured to be quicker; the operands of products are tensors then."""
    asked, tile = set(), _table.tile
    monkeypatch.setattr(_table, "written_first", lambda *_: True)
    monkeypatch.setattr(_table, "narrow", lambda *_: False)
    monkeypatch.setattr(_table, "tile", lambda primitive, *rest: (asked.add(primitive), tile(primitive, *rest))[1])
    monkeypatch.setattr(cost, "covariance_rows", lambda *_: rows)
    monkeypatch.setattr(cost, "gpu_covariance_rows", lambda *_: rows)
    check(name, "autocast-bfloat16")
    wanted = {"outer_product", "conv_backward", *(["expand_dgrad"] if rows == 1 else [])}
    wanted -= {"conv_backward"} if name == "small-strided" else set()  # its addend is strided
    assert {f"{primitive} of tensors" for primitive in wanted} <= asked


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast-bfloat16", "autocast-float16"])
@pytest.mark.parametrize("name", ["small-strided", "odd-projection", "small-preact-bottleneck", "small-stem", "stage2"])
def test_blocks_on_a_gpu(name, mode, monkeypatch):
    """As launched in use, nothing between the kernels and their tensors."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    comparison.check_case(cases.CASES[name], fuse, MODES[mode], range(5), device="cuda", kinks=False)


def step(block, x):
    x = x.clone().requires_grad_()
    out = block(x)
    out.backward(torch.ones_like(out))
    return [out.detach(), x.grad, *(p.grad for p in block.parameters()), *block.buffers()]


def test_the_same_bits_every_time(runner):
    case = cases.CASES["small-strided"]
    block, x = cases.make_block(case), cases.make_input(case)
    first, second = (step(fuse(copy.deepcopy(block)), x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_the_same_bits_on_a_gpu(deterministic):
    """On CUDA tensors themselves, the 3x3 too."""
    case = cases.CASES["small-strided"]
    block, x = cases.make_block(case, device="cuda"), cases.make_input(case, device="cuda")
    first, second = (step(fuse(copy.deepcopy(block)), x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_frozen_statistics_and_no_grad(runner):
    case = cases.CASES["small-projection"]
    block, x = cases.make_block(case).eval(), cases.make_input(case)
    expected = step(copy.deepcopy(block), x)
    for ours, theirs in zip(step(fuse(copy.deepcopy(block)), x), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(fuse(block)(x), expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_turns_nan_is_seen(value, runner):
    case = cases.CASES["small-identity"]
    block, x = fuse(cases.make_block(case)), cases.make_input(case)
    x[0, 0, 0, 0] = value
    out = block(x)
    assert out.isnan().any() and all(not b.isfinite().all() for n, b in block.named_buffers() if "running" in n)


def test_row_scale_and_gradients_of_few_parameters(runner):
    """Stochastic depth, and only one weight that wants a gradient."""
    convs = random_bottleneck(dtype=torch.float32)
    for c in convs[:2]:
        c.weight.requires_grad_(False)
    x, rows = activation(3, 8, 5, 4, dtype=torch.float32), torch.tensor([0.0, 2.0, 1.5])
    found = []
    for backend in ("triton", "eager"):
        twins = tuple(c._replace(running_mean=None, running_var=None, num_batches_tracked=None) for c in convs)
        out = conv_bn_add_relu(x, *twins, shortcut=x, row_scale=rows, backend=backend)
        found.append((out, *torch.autograd.grad(out.square().sum(), [convs[2].weight, convs[2].gamma])))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def differentiated(call, tensors):
    """The results of a call on fresh leaves of tensors, and their gradients."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_dense_layers_of_several_parts(layout, runner):
    """Slices of a gradient, and parts in either layout."""
    parts = [activation(2, c, 5, 4, dtype=torch.float32, seed=c).contiguous(memory_format=layout) for c in (6, 9)]
    norm, last = bn(15, dtype=torch.float32), conv(15, 7, 3, padding=(1, 1), dtype=torch.float32)
    found = [
        differentiated(
            lambda *x, b=backend: preactivation(list(x), norm, last, shortcut="none", backend=b), parts
        )
        for backend in ("triton", "eager")
    ]
    same(*found)


@pytest.mark.parametrize("size", ["pixel", "sample"])
def test_gates_that_broadcast(size, runner):
    convs = random_bottleneck(dtype=torch.float32)
    x = activation(2, 8, 5, 4, dtype=torch.float32)
    gate = torch.rand(2, 8, 1, 1) if size == "sample" else torch.rand(2, 1, 5, 4)
    found = [
        differentiated(
            lambda x, g, b=backend: conv_bn_add_relu(x, *convs, shortcut=x, gate=g, backend=b), [x, gate]
        )
        for backend in ("triton", "eager")
    ]
    same(*found)


def test_vectors_of_any_stride(runner):
    """Parameters, statistics, factors and buffers that are columns of something."""
    x = activation(2, 8, 5, 4, dtype=torch.float32)
    columns = torch.rand(8, 4) + 0.5
    norm = bn(8, dtype=torch.float32, gamma=columns[:, 0], beta=columns[:, 1])
    known = Stats(columns[:, 2].double(), columns[:, 3])
    last = conv(8, 8, 3, padding=(1, 1), dtype=torch.float32)
    rows = (torch.rand(2, 3) + 0.5)[:, 1]
    found = []
    for backend in ("triton", "eager"):
        buffers = torch.ones(8, 3)
        own = norm._replace(running_mean=buffers[:, 0], running_var=buffers[:, 2], num_batches_tracked=torch.tensor(0))
        out = preactivation(x, own, last, shortcut=x, row_scale=rows, stats=known, backend=backend)
        found.append([out.detach(), buffers])
    same(*found)


def test_one_input_channel_and_a_stride(runner):
    convs = (*random_bottleneck(1, 4, 8, dtype=torch.float32)[:3],)
    projection = conv_bn(1, 8, stride=(2, 2), dtype=torch.float32)
    convs = (convs[0], convs[1]._replace(stride=(2, 2)), convs[2])
    x = activation(2, 1, 8, 8, dtype=torch.float32)
    found = [
        differentiated(lambda x, b=backend: conv_bn_add_relu(x, *convs, shortcut=projection, backend=b), [x])
        for backend in ("triton", "eager")
    ]
    same(*found)


def test_what_is_measured_on_a_gpu_runs(monkeypatch):
    """Every line of the primitives' benchmark gives what the eager set gives."""
    from benchmarks.primitives import _tensors, with_windows, works

    case = cases.BottleneckCase("tiny", 32, 8, 32, 6, batch=2)
    with triton_kernels(monkeypatch):
        sets = [dispatch.kernels(name, "cpu", torch.bfloat16) for name in ("triton", "eager")]
        for name, work in works(case, torch.bfloat16, torch.device("cpu")).items():
            for k in (sets[0], *([with_windows(sets[0])] if "3x3" in name else [])):
                for ours, theirs in zip(_tensors(work.call(k)), _tensors(work.call(sets[1])), strict=True):
                    assert relative_error(ours, theirs) < 0.02, name


def test_tf32_is_rounded_and_its_statistics_are_of_the_rounded(monkeypatch):
    """As torch's convolutions on a GPU take float32: to nearest tf32, never cut off."""
    x = activation(2, 24, 5, 5, dtype=torch.float32)
    w = torch.randn(40, 24, 1, 1)
    exact = torch.nn.functional.conv2d(round_to_tf32(x).double(), round_to_tf32(w).double())
    with triton_kernels(monkeypatch, tf32=True):
        z, _ = conv_stats(x, w, POINTWISE, True)
        mean, cov = covariance(x)
    assert torch.allclose(z.double(), exact, atol=1e-5)
    assert not torch.allclose(z.double(), torch.nn.functional.conv2d(x.double(), w.double()), atol=1e-5)
    rows = round_to_tf32(x).double().permute(0, 2, 3, 1).reshape(-1, 24)
    assert torch.allclose(mean.double(), rows.mean(0), atol=1e-6)
    assert torch.allclose(cov.double(), torch.cov(rows.T, correction=0), atol=1e-6)
    nan = torch.full((1,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # whose rounded bits would be -0
    with triton_kernels(monkeypatch, tf32=True):
        z, _ = conv_stats(nan.expand(1, 16, 1, 1).clone(), torch.ones(16, 16, 1, 1), POINTWISE, False)
    assert z.isnan().all()


def test_what_the_set_refuses(monkeypatch):
    """By name it runs or says every reason; `auto` does not choose it before a GPU has proven it."""
    x = activation(2, 8, 4, 4, dtype=torch.float32)
    with pytest.raises(Unsupported, match="do not run on cpu"):
        bottleneck(x, *random_bottleneck(dtype=torch.float32), backend="triton")
    assert {r.code for r in dispatch.missing("triton", "cpu", torch.float64)} >= {"dtype", "device"}
    if not measured.proven("triton", "cuda"):
        assert "triton" not in dispatch.kernels("auto", "cuda", torch.bfloat16).chosen.values()
    with triton_kernels(monkeypatch):
        nchw = torch.randn(2, 8, 4, 4)
        with pytest.raises(Unsupported, match="not channels_last"):
            apply(Norm(nchw, torch.ones(8), torch.zeros(8)), Sum(), Want())
        with pytest.raises(Unsupported, match="g is not dense"):
            select(Masked(x[:, :, ::2], None, None, 2.0))
        silu = Norm(x, torch.ones(8), torch.zeros(8), act=Activation("silu"))
        with pytest.raises(Unsupported, match="no kernel but bn_act has silu"):
            conv_stats(silu, x[:1, :, :1, :1], POINTWISE, False)
        context = BNContext(*torch.ones(2, 8), None, True)
        with pytest.raises(Unsupported, match="z is not dense"):
            bn_act(silu._replace(z=nchw))
        with pytest.raises(Unsupported, match="dy is not dense"):
            bn_act_backward(nchw, silu, context)


def test_the_report_says_unproven(runner):
    block = fuse(cases.make_block(cases.CASES["small-identity"]))
    expected = [] if measured.proven("triton", "cuda") else ["unproven"]
    assert [note.code for note in resfuse.report(block).notes] == expected


def test_rows_begin_beyond_two_to_the_31(monkeypatch):
    @triton.jit
    def starts(view, out, first, channels):
        index = first + tl.arange(0, 16)
        tl.store(out + tl.arange(0, 16), row_starts(view, index, channels))

    with triton_kernels(monkeypatch):
        out, index = torch.zeros(16, dtype=torch.int64), 3_000_000 + torch.arange(16)
        launch(starts, 1, out, None, out, 3_000_000, 4096)
        assert torch.equal(out, index * 4096)
        view = View(12, 4, 10**9, 4096, 512)
        launch(starts, 1, out, view, out, 3_000_000, 4096)
        assert torch.equal(out, index // 12 * 10**9 + index % 12 // 4 * 4096 + index % 4 * 512)


def test_merging_many_shares(monkeypatch):
    """More than interpreted kernels have rows for: sums, and moments whose last share has fewer rows."""
    shares, each, rest, channels = 300, 5, 3, 24
    rows = torch.randn(shares, each, channels) + 20
    kept = torch.cat([rows[:-1].reshape(-1, channels), rows[-1, :rest]]).double()
    parts = [*rows[:-1], rows[-1, :rest]]
    moments = torch.stack([torch.stack([p.mean(0), ((p - p.mean(0)) ** 2).sum(0)]) for p in parts])
    with triton_kernels(monkeypatch):
        fewer = fewer_shares(moments)
        stats = merge_moments(moments, each, len(kept))
    assert len(fewer) < 10 and torch.allclose(fewer.sum(0), moments.sum(0), rtol=1e-5)
    assert torch.allclose(stats.mean.double(), kept.mean(0), rtol=1e-6)
    assert torch.allclose(stats.var.double(), kept.var(0, correction=0), rtol=1e-5)


# The tools ---------------------------------------------------------------------------------------------------


def test_margins_catch_reads_and_writes(monkeypatch):
    @triton.jit
    def shifted(x, out, n, read, wrote):
        at = tl.arange(0, 16)
        tl.store(out + at + wrote, tl.load(x + at + read, mask=at < n, other=0.0), mask=at < n)

    x, out = torch.ones(10), torch.empty(10)
    with triton_kernels(monkeypatch):
        launch(shifted, 1, x, x, out, 10, 0, 0)
        assert torch.equal(out, x)
        launch(shifted, 1, x, x, out, 10, 1, 0)
        assert out.isnan().any()
        with pytest.raises(AssertionError, match="shifted wrote outside of a buffer"):
            launch(shifted, 1, x, x, out, 10, 0, 1)


def test_the_interpreter_rounds_as_a_gpu(monkeypatch):
    @triton.jit
    def round_and_multiply(x, out, product, PRECISION: tl.constexpr):
        at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
        t = tl.load(x + at)
        tl.store(out + at, t.to(tl.bfloat16))
        tl.store(product + at, tl.dot(t, t, input_precision=PRECISION))

    x = torch.randn(16, 16)
    out, product = torch.empty(16, 16, dtype=torch.bfloat16), torch.empty(16, 16)
    with triton_kernels(monkeypatch):
        launch(round_and_multiply, 1, x, x, out, product, PRECISION="tf32")
        cut = (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
        assert torch.equal(out, x.bfloat16()) and torch.allclose(product, cut @ cut, atol=1e-5)
        assert not torch.allclose(product, x @ x, atol=1e-5)
        launch(round_and_multiply, 1, x, x, out, product, PRECISION="ieee")
        assert torch.allclose(product, x @ x, atol=1e-5)
