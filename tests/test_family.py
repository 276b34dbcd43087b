"""The whole residual family in float64 against torch's own autograd: gradients of first and second order, buffers."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from units import activation, bn, conv, conv_bn

from resfuse import arguments, calls, functional, reference
from resfuse.functional import Activation, ArgumentError, Pooled, Stats, Window, ZeroPad

pytestmark = pytest.mark.gate  # no speed is reported while these fail


@dataclass
class Block:
    """Arguments of an entry point: a norm first makes it `preactivation`, shortcut "none" a `conv_bn_relu`."""

    convs: list
    bn: object = None
    shortcut: object = "none"
    options: dict = field(default_factory=dict)
    channels: tuple = (8,)

    def parts(self):
        return self.convs, self.bn, self.shortcut, self.options

    def with_parts(self, parts):
        return Block(*parts, self.channels)

    def input(self, n=3, h=5, w=4, **kwargs):
        found = [activation(n, c, h, w, seed=i, **kwargs) for i, c in enumerate(self.channels)]
        return [x.requires_grad_() for x in found]

    def ours(self, parts, **kwargs):
        x = parts[0] if len(parts) == 1 else parts
        if self.bn is not None:
            return functional.preactivation(
                x, self.bn, *self.convs, shortcut=self.shortcut, **self.options, **kwargs
            )
        if isinstance(self.shortcut, str):
            return functional.conv_bn_relu(x, *self.convs, **self.options, **kwargs)
        return functional.conv_bn_add_relu(x, *self.convs, shortcut=self.shortcut, **self.options, **kwargs)

    def theirs(self, parts):
        options = self.options if self.bn is None else {"relu": False, **self.options}
        return reference.block(parts, *self.convs, bn=self.bn, shortcut=self.shortcut, **options)


def same(in_, out, stride=1, **kwargs):
    """A 3x3 that keeps its size, or halves it."""
    return conv_bn(in_, out, 3, padding=(1, 1), stride=(stride, stride), **kwargs)


def last(in_, out, kernel=3, stride=1, **kwargs):
    pad = kernel // 2
    return conv(in_, out, kernel, padding=(pad, pad), stride=(stride, stride), **kwargs)


SILU, LEAKY = Activation("silu"), Activation("leaky_relu", 0.2)
ROW_SCALE = torch.tensor([0.0, 1.25, 2.0], dtype=torch.float64)
HALF, CEIL = Window((2, 2), (2, 2), ceil_mode=True), Window((3, 3), (2, 2), (1, 1))
PROJECTION = dict(stride=(2, 2), seed=9)


def given_residual(*shape):
    return activation(*shape, seed=5).requires_grad_()


BLOCKS = {
    # post-activation
    "basic identity": lambda: Block([same(8, 8), same(8, 8, seed=1)], shortcut=None),
    "basic projection": lambda: Block([same(8, 12, 2), same(12, 12)], shortcut=conv_bn(8, 12, **PROJECTION)),
    "basic 3x3 projection": lambda: Block([same(8, 12, 2), same(12, 12)], shortcut=same(8, 12, 2, seed=9)),
    "basic D": lambda: Block(
        [same(8, 12, 2), same(12, 12)], shortcut=Pooled(conv_bn(8, 12, seed=9), HALF, count_include_pad=False)
    ),
    "basic D strided": lambda: Block(
        [same(8, 12, 2), same(12, 12, 2)], shortcut=Pooled(conv_bn(8, 12, **PROJECTION), HALF)
    ),
    "basic A": lambda: Block([same(8, 13, 2), same(13, 13)], shortcut=ZeroPad(13, 2, (2, 2))),
    "basic bias": lambda: Block([same(8, 8, bias=True), same(8, 8, bias=True)], shortcut=None),
    "unnormalised projection": lambda: Block([same(8, 12)], shortcut=conv(8, 12, bias=True)),
    "drop path": lambda: Block([same(8, 8), conv_bn(8, 8)], shortcut=None, options=dict(row_scale=ROW_SCALE)),
    "scaled sum": lambda: Block([same(8, 8), same(8, 8)], shortcut=None, options=dict(scale=0.5**0.5)),
    "scaled drop path": lambda: Block(
        [conv_bn(8, 4), conv_bn(4, 12)], shortcut=conv_bn(8, 12, seed=9),
        options=dict(scale=0.5, row_scale=ROW_SCALE),
    ),
    "highway": lambda: Block(
        [same(8, 8), same(8, 8)], shortcut=None,
        options=dict(gate=activation(3, 8, 5, 4, seed=4).sigmoid().detach().requires_grad_()),
    ),
    "highway per channel": lambda: Block(
        [conv_bn(8, 4), conv_bn(4, 8)], shortcut=conv_bn(8, 8, seed=9),
        options=dict(gate=torch.rand(1, 8, 1, 1, dtype=torch.float64).requires_grad_(), row_scale=ROW_SCALE),
    ),
    "highway given": lambda: Block(
        [same(8, 8)], shortcut=given_residual(3, 8, 5, 4),
        options=dict(gate=torch.rand(3, 1, 5, 4, dtype=torch.float64).requires_grad_(), scale=2.0),
    ),
    "no activation": lambda: Block([same(8, 8), same(8, 8)], shortcut=None, options=dict(relu=False)),
    "given": lambda: Block([same(8, 6)], shortcut=given_residual(3, 6, 5, 4)),
    "given, wide": lambda: Block([conv_bn(8, 12)], shortcut=given_residual(3, 12, 5, 4)),
    "given, linear": lambda: Block([same(8, 6)], shortcut=given_residual(3, 6, 5, 4), options=dict(relu=False)),
    # chains
    "one": lambda: Block([same(8, 6)]),
    "one linear": lambda: Block([same(8, 6, bias=True)], options=dict(relu=False)),
    "one wide": lambda: Block([conv_bn(8, 12)]),
    "one wide strided": lambda: Block([conv_bn(8, 12, stride=(2, 2))]),
    "one wide identity": lambda: Block([conv_bn(8, 8)], shortcut=None),
    "one wide strided A": lambda: Block([conv_bn(8, 12, stride=(2, 2))], shortcut=ZeroPad(12, stride=(2, 2))),
    "one wide linear": lambda: Block([conv_bn(8, 12)], options=dict(relu=False)),
    "one narrow": lambda: Block([conv_bn(8, 5)]),
    "depthwise": lambda: Block([same(8, 8, groups=8)]),
    "grouped 1x1": lambda: Block([conv_bn(8, 16, groups=4)]),
    "inverted residual": lambda: Block(
        [conv_bn(8, 16), same(16, 16, groups=16), conv_bn(16, 8)], shortcut=None, options=dict(relu=False)
    ),
    "silu": lambda: Block([conv_bn(8, 12, act=SILU), same(12, 12, groups=12, act=SILU)]),
    "silu, wide": lambda: Block([same(8, 6, act=SILU), conv_bn(6, 12)], shortcut=conv_bn(8, 12, seed=9)),
    "silu, linear": lambda: Block([same(8, 6, act=SILU), conv_bn(6, 12, act=SILU)], options=dict(relu=False)),
    "silu between relu": lambda: Block(
        [conv_bn(8, 4), same(4, 4, 2, act=SILU), conv_bn(4, 8)], shortcut=conv_bn(8, 8, **PROJECTION)
    ),
    "hardswish": lambda: Block([same(8, 6, act=Activation("hardswish")), same(6, 8)], shortcut=None),
    "relu6, wide": lambda: Block([conv_bn(8, 12, bias=True, act=Activation("relu6"))]),
    "leaky relu": lambda: Block([conv_bn(8, 4, act=LEAKY), same(4, 8)], shortcut=None, options=dict(relu=False)),
    "leaky relu at the end": lambda: Block([same(8, 6), same(6, 4, act=LEAKY)], channels=(3, 5)),
    "preact silu": lambda: Block([conv_bn(8, 4, act=SILU), last(4, 8)], bn(8), None),
    "asymmetric": lambda: Block([conv_bn(8, 6, 3, padding=(1, 0), stride=(1, 2), dilation=(1, 1))]),
    "side by side": lambda: Block([same(8, 6), same(6, 4)], channels=(3, 5)),
    "side by side, wide": lambda: Block([conv_bn(8, 12)], channels=(3, 4, 1), shortcut=conv_bn(8, 12, seed=9)),
    # pre-activation
    "preact basic": lambda: Block([same(8, 8), last(8, 8)], bn(8), shortcut=None),
    "preact basic projection": lambda: Block([same(8, 12, 2), last(12, 12)], bn(8), conv(8, 12, **PROJECTION)),
    "preact basic 3x3 projection": lambda: Block([same(8, 12, 2), last(12, 12)], bn(8), last(8, 12, 3, 2, bias=True)),
    "preact basic A": lambda: Block([same(8, 13, 2), last(13, 13)], bn(8), ZeroPad(13, 3, (2, 2))),
    "preact D": lambda: Block([same(8, 12, 2), last(12, 12)], bn(8), Pooled(conv(8, 12), CEIL)),
    "preact bottleneck": lambda: Block([conv_bn(8, 4), same(4, 4), last(4, 8, 1)], bn(8), None),
    "preact bottleneck projection": lambda: Block(
        [conv_bn(8, 4), same(4, 4, 2), last(4, 12, 1, bias=True)], bn(8), conv(8, 12, bias=True, **PROJECTION)
    ),
    "preact one": lambda: Block([last(8, 8)], bn(8), None),
    "preact one 1x1": lambda: Block([last(8, 12, 1)], bn(8), conv(8, 12, seed=9)),
    "preact strided end": lambda: Block([same(8, 4), conv(4, 8, stride=(2, 2), bias=True)], bn(8)),
    "preact drop path": lambda: Block([same(8, 8), last(8, 8)], bn(8), None, dict(row_scale=ROW_SCALE, scale=0.7)),
    "preact highway": lambda: Block(
        [same(8, 8), last(8, 8, bias=True)], bn(8), None,
        dict(gate=activation(3, 8, 5, 4, seed=4).sigmoid().detach().requires_grad_()),
    ),
    "preact given": lambda: Block([last(8, 6)], bn(8), given_residual(3, 6, 5, 4)),
    "dense": lambda: Block([conv_bn(8, 12), last(12, 4)], bn(8), channels=(3, 4, 1)),
    "dense, one feature": lambda: Block([conv_bn(8, 12), last(12, 4)], bn(8)),
    "preact side by side": lambda: Block([last(8, 6)], bn(8), conv(8, 6, seed=9), channels=(2, 6)),
}


def frozen(block):
    """The same with constant statistics everywhere."""
    def still(c):
        if isinstance(c, Pooled):
            return c._replace(conv=still(c.conv))
        return c._replace(training=False) if hasattr(c, "training") else c

    return Block([still(c) for c in block.convs], block.bn and still(block.bn), still(block.shortcut), block.options,
                 block.channels)


@pytest.fixture(params=BLOCKS)
def block(request):
    return BLOCKS[request.param]()


@pytest.fixture(params=["few rows", "many rows"])
def rows(request, monkeypatch):
    """Which side of the cost model's limit."""
    limit = 10**9 if request.param == "few rows" else 1
    monkeypatch.setattr(calls.cost, "covariance_rows", lambda *_: limit)


def leaves(*trees):
    """Every tensor in the arguments, in a fixed order."""
    return [t for t in tree_flatten(trees)[0] if isinstance(t, torch.Tensor)]


def outcome(run, block, inputs, seed=0):
    """out, and every gradient and buffer after backward."""
    out = run(block, inputs)
    generator = torch.Generator().manual_seed(seed)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype))
    tensors = leaves(inputs, *block.parts())
    return [out.detach(), *(t.grad for t in tensors if t.requires_grad), *(t for t in tensors if not t.requires_grad)]


def agree(block, inputs=None, tolerance=1e-9):
    inputs = block.input() if inputs is None else inputs
    twin, theirs = copy.deepcopy(block), copy.deepcopy(inputs)
    found = outcome(lambda b, x: b.ours(x, backend="eager"), block, inputs)
    expected = outcome(lambda b, x: b.theirs(x), twin, theirs)
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, i
        assert (a.double() - b.double()).norm() <= tolerance * (1 + b.double().norm()), i


@pytest.mark.parametrize("mode", ["train", "frozen"])
def test_equals_autograd(block, mode, rows, poisoned):
    agree(block if mode == "train" else frozen(block))


@pytest.mark.parametrize("small", [0, 1 << 15], ids=["NCHW inside", "channels_last inside"])
def test_equals_autograd_in_nchw(block, small, monkeypatch):
    monkeypatch.setattr(calls, "SMALL_SAMPLE", small)
    agree(block, block.input(channels_last=False))


@pytest.mark.parametrize("name", [name for name in BLOCKS if "highway" not in name])
def test_strides_are_eagers(name):
    """But for a gate's own layout, which eager's products may take on."""
    block = BLOCKS[name]()
    for channels_last in (True, False):
        inputs = block.input(channels_last=channels_last)
        ours, theirs = block.ours(inputs), block.theirs(inputs)
        assert ours.stride() == theirs.stride()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("mode", ["train", "frozen"])
def test_gradcheck(block, mode, rows):
    block = block if mode == "train" else frozen(block)
    inputs = block.input(h=4)
    if any(t.dim() == 4 and t.shape[2] == 5 for t in leaves(block.shortcut, block.options)):
        inputs = block.input()
    flat, spec = tree_flatten((inputs, block.parts()))
    places = [i for i, t in enumerate(flat) if isinstance(t, torch.Tensor) and t.requires_grad]

    def call(*tensors):
        filled = list(flat)
        for i, t in zip(places, tensors, strict=True):
            filled[i] = t
        x, parts = tree_unflatten(filled, spec)
        return block.with_parts(parts).ours(x, backend="eager")

    assert torch.autograd.gradcheck(call, [flat[i] for i in places], fast_mode=True)


def test_double_backward(block):
    """A gradient penalty, in every input and parameter."""
    found = []
    for run in (lambda b, x: b.ours(x), lambda b, x: b.theirs(x)):
        b, inputs = copy.deepcopy(block), block.input()
        wanted = [t for t in leaves(inputs, *b.parts()) if t.requires_grad]
        out = run(b, inputs)
        gradients = torch.autograd.grad(out.square().sum(), wanted, create_graph=True)
        (out.sum() + sum(g.square().sum() for g in gradients)).backward()
        found.append([t.grad for t in wanted])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-7, atol=1e-7)


def test_only_wanted_gradients_come(block):
    """One parameter or input at a time."""
    wanted = len([t for t in leaves(block.input(), *block.parts()) if t.requires_grad])
    for chosen in range(wanted):
        found = []
        for run in (lambda b, x: b.ours(x), lambda b, x: b.theirs(x)):
            b, inputs = copy.deepcopy(block), block.input()
            tensors = [t for t in leaves(inputs, *b.parts()) if t.requires_grad]
            for i, t in enumerate(tensors):
                t.requires_grad_(i == chosen)
            run(b, inputs).square().sum().backward()
            assert all((t.grad is None) == (i != chosen) for i, t in enumerate(tensors))
            found.append(tensors[chosen].grad)
        assert torch.allclose(*found, rtol=1e-8, atol=1e-8)


@given(
    n=st.integers(1, 3), h=st.integers(2, 8), w=st.integers(2, 8), outer=st.integers(1, 17), inner=st.integers(1, 9),
    stride=st.integers(1, 3), kernels=st.lists(st.sampled_from([1, 3]), min_size=1, max_size=3),
    shortcut=st.sampled_from(["none", "identity", "projection", "padded", "pooled"]), preact=st.booleans(),
    relu=st.booleans(), bias=st.booleans(), training=st.booleans(), channels_last=st.booleans(), drop=st.booleans(),
)
@settings(max_examples=120, deadline=None, derandomize=True)
def test_any_block_equals_autograd(
    n, h, w, outer, inner, stride, kernels, shortcut, preact, relu, bias, training, channels_last, drop
):
    stride = stride if shortcut not in ("identity", "pooled") else 1
    step = 2 if shortcut == "pooled" else stride
    if training and n * -(-h // step) * -(-w // step) < 3:  # two values a channel: all rounding
        return
    out = outer if shortcut == "identity" else outer + 3
    widths = [outer, *[inner] * (len(kernels) - 1), out]
    common = dict(bias=bias)
    convs = []
    for i, kernel in enumerate(kernels):
        final = i + 1 == len(kernels)
        make = conv if preact and final else conv_bn
        mode = {} if make is conv else dict(training=training)
        pad = kernel // 2
        convs.append(make(
            widths[i], widths[i + 1], kernel, padding=(pad, pad), stride=(step if i == 0 else 1,) * 2, seed=i, **common,
            **mode,
        ))
    side = conv if preact else conv_bn
    mode = {} if preact else dict(training=training)
    block = Block(convs, bn(outer, training=training) if preact else None, {
        "none": "none",
        "identity": None,
        "projection": side(outer, out, stride=(stride, stride), seed=9, **common, **mode),
        "padded": ZeroPad(out, 1, (stride, stride)),
        "pooled": Pooled(side(outer, out, seed=9, **common, **mode), HALF, False),
    }[shortcut], {}, (outer,))
    if not preact:
        block.options["relu"] = relu
    if drop and shortcut != "none":
        block.options["row_scale"] = torch.rand(n, dtype=torch.float64) * 2
    agree(block, block.input(n, h, w, channels_last=channels_last), tolerance=1e-7)


# Pre-activation: statistics are handed on -------------------------------------------------------------------------


def test_statistics_of_the_sum_are_handed_on():
    first, second = BLOCKS["preact basic"](), BLOCKS["preact bottleneck"]()
    x = first.input()
    twin, again = copy.deepcopy((first, second)), copy.deepcopy(x)
    out, stats = first.ours(x, want_stats=True)
    assert torch.allclose(stats.mean, out.mean((0, 2, 3))) and not stats.mean.requires_grad
    assert torch.allclose(stats.var, out.var((0, 2, 3), correction=0))
    second.ours([out], stats=stats).square().sum().backward()
    twin[1].theirs([twin[0].theirs(again)]).square().sum().backward()
    for ours, theirs in zip(leaves(x, *first.parts(), *second.parts()),
                            leaves(again, *twin[0].parts(), *twin[1].parts()), strict=True):
        if ours.requires_grad:
            assert torch.allclose(ours.grad, theirs.grad)
        else:
            assert torch.allclose(ours, theirs)


def test_given_statistics_are_used():
    block = BLOCKS["preact basic"]()
    x = block.input()
    wrong = Stats(torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64))
    assert not torch.allclose(block.ours(x, stats=wrong), block.ours(x))
    still = frozen(block)
    assert torch.equal(still.ours(x, stats=wrong), still.ours(x)), "constant statistics need none"


def test_weights_of_a_sum_are_taken_in_any_dtype():
    block = BLOCKS["basic identity"]()
    x = [t.float() for t in block.input()]
    convs = tree_map_only(torch.Tensor, lambda t: t.detach().float() if t.is_floating_point() else t, block.convs)
    gate = torch.rand(3, 8, 5, 4, dtype=torch.float64)
    for weights in (dict(row_scale=ROW_SCALE), dict(gate=gate)):
        narrow = {name: t.float() for name, t in weights.items()}
        found = [functional.conv_bn_add_relu(x[0], *convs, **each) for each in (weights, narrow)]
        assert torch.equal(*found) and found[0].dtype == torch.float32


def test_bn_relu_takes_given_statistics():
    x, norm = activation(3, 8, 5, 4), bn(8)
    stats = Stats(x.mean((0, 2, 3)) + 1, x.var((0, 2, 3), correction=0))
    shifted = functional.bn_relu(x, norm._replace(running_mean=None, running_var=None), stats=stats)
    assert torch.allclose(shifted, functional.bn_relu(x, norm._replace(
        running_mean=stats.mean, running_var=stats.var, training=False)))


# BatchNorm, ReLU, pool ---------------------------------------------------------------------------------------------

POOLS = {
    "none": None,
    "stem": Window((3, 3), (2, 2), (1, 1)),
    "even": Window((2, 2), (2, 2)),
    "ceil": Window((3, 2), (2, 2), (1, 0), ceil_mode=True),
    "ceil outside": Window((2, 2), (3, 3), (1, 1), ceil_mode=True),
    "dilated": Window((2, 3), (1, 2), (0, 1), (2, 1)),
}


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pool", POOLS)
def test_bn_relu(pool, training, channels_last, poisoned):
    pool, norm = POOLS[pool], bn(5, training=training)
    x = activation(2, 5, 7, 6, channels_last=channels_last).requires_grad_()
    y, other = copy.deepcopy(x), copy.deepcopy(norm)
    out, expected = functional.bn_relu(x, norm, pool), reference.bn_relu(y, other, pool)
    assert out.stride() == expected.stride()
    dout = torch.randn_like(expected)
    out.backward(dout)
    expected.backward(dout)
    assert torch.allclose(out, expected) and x.grad.stride() == y.grad.stride()
    for a, b in zip(leaves(x, norm), leaves(y, other), strict=True):
        assert torch.allclose(a.grad, b.grad) if a.requires_grad else torch.allclose(a, b)
    still = norm._replace(training=False)
    assert torch.autograd.gradcheck(lambda x: functional.bn_relu(x, still, pool), x, fast_mode=True)
    assert torch.autograd.gradcheck(
        lambda x, g, b: functional.bn_relu(x, norm._replace(gamma=g, beta=b), pool), (x, norm.gamma, norm.beta),
        fast_mode=True,
    )


@pytest.mark.parametrize("pool", [name for name, window in POOLS.items() if window])
def test_shapes_of_pools_are_torchs(pool):
    for size in ((7, 6), (8, 9), (5, 5)):
        x = torch.empty(2, 5, *size)
        expected = torch.nn.functional.max_pool2d(x, *POOLS[pool]).shape
        assert arguments.pooled_shape(x.shape, POOLS[pool], "pool") == expected


@pytest.mark.parametrize("pool", POOLS)
def test_bn_relu_double_backward(pool):
    found = []
    for run in (functional.bn_relu, reference.bn_relu):
        x, norm = activation(2, 5, 7, 6).requires_grad_(), bn(5)
        out = run(x, norm, POOLS[pool])
        (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        (out.sum() + dx.square().sum()).backward()
        found.append((x.grad, norm.gamma.grad))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_pool_finds_torchs_maxima_bit_for_bit(dtype):
    """Ties, zeros under the ReLU, NaN and inf: where the maximum is decides where the gradient goes."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-2, 3, (2, 4, 9, 8), generator=generator).to(dtype)
    x[0, 0, 2, 2], x[0, 1, 4, 4], x[0, 1, 4, 5], x[1, 2, 3, 3] = float("nan"), float("nan"), float("nan"), float("inf")
    x = x.contiguous(memory_format=torch.channels_last)
    still = bn(4, dtype=torch.float32, training=False)._replace(
        running_mean=torch.zeros(4), running_var=torch.full((4,), 0.5), gamma=torch.ones(4), beta=torch.zeros(4),
        eps=0.5,
    )
    found = []
    for run in (functional.bn_relu, reference.bn_relu):
        leaf = x.clone().requires_grad_()
        out = run(leaf, still, POOLS["stem"])
        out.backward(torch.arange(out.numel()).view(out.shape).to(dtype))
        found.append((out.detach(), leaf.grad))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))


# Bad arguments -----------------------------------------------------------------------------------------------------

X = activation(3, 8, 5, 4)
REFUSED = {
    "no convolution": (lambda: functional.conv_bn_relu(X), "convs: at least one"),
    "wrong kind": (lambda: functional.conv_bn_relu(X, conv(8, 8)), "conv1 must be a ConvBN, got Conv"),
    "wrong last": (lambda: functional.preactivation(X, bn(8), conv_bn(8, 8)), "conv1 must be a Conv, got ConvBN"),
    "shortcut's type": (lambda: functional.conv_bn_add_relu(X, same(8, 8), shortcut=3), "shortcut must be None"),
    "given shape": (lambda: functional.conv_bn_add_relu(X, same(8, 8), shortcut=X[:, :4]), "conv1's output"),
    "given dtype": (lambda: functional.conv_bn_add_relu(X, same(8, 8), shortcut=X.float()), "shortcut is torch.fl"),
    "given device": (lambda: functional.conv_bn_add_relu(X, same(8, 8), shortcut=X.to("meta")), "shortcut must be on"),
    "padding": (lambda: functional.conv_bn_add_relu(X, same(8, 12), shortcut=ZeroPad(12, 5)), "shortcut: 8 channels"),
    "scale": (lambda: functional.conv_bn_add_relu(X, same(8, 8), scale=-1.0), "scale must be a positive number"),
    "weights of no sum": (lambda: functional.preactivation(X, bn(8), last(8, 8), scale=0.5), "without a shortcut"),
    "row_scale": (lambda: functional.conv_bn_add_relu(X, same(8, 8), row_scale=X[:2, 0, 0, 0]), "row_scale must"),
    "gate": (lambda: functional.conv_bn_add_relu(X, same(8, 8), gate=X[:2, :1, :1, :1]), r"gate \(2, 1, 1, 1\)"),
    "parts": (lambda: functional.conv_bn_relu([X, X[:, :, :4]], same(16, 8)), r"x\[1\] is \(3, 8, 4, 4\)"),
    "parts' dtypes": (lambda: functional.conv_bn_relu([X, X.float()], same(16, 8)), r"x\[1\] is torch.float32"),
    "parts and x": (lambda: functional.conv_bn_add_relu([X[:, :4], X[:, 4:]], same(8, 8)), "2 tensors side by side"),
    "bn": (lambda: functional.preactivation(X, bn(7), last(8, 8)), r"bn.gamma must be \[8\]"),
    "stats": (lambda: functional.preactivation(X, bn(8), last(8, 8), stats=Stats(1, 2)), "stats.mean must be a tensor"),
    "window": (lambda: functional.bn_relu(X, bn(8), Window((2, 2), (2, 2), (2, 2))), "pool: "),
    "large window": (lambda: functional.bn_relu(activation(1, 8, 20, 20), bn(8), Window((16, 16), (1, 1))), "255"),
    "no output": (lambda: functional.bn_relu(X, bn(8), Window((7, 7), (1, 1))), "leaves no output"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors_name_the_argument(case):
    call, message = REFUSED[case]
    with pytest.raises(ArgumentError, match=message):
        call()


def test_one_value_per_channel_raises_torchs_error():
    x = activation(1, 8, 1, 1)
    for call in (lambda: functional.bn_relu(x, bn(8)), lambda: functional.preactivation(x, bn(8), last(8, 8))):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            call()
