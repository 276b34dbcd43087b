"""The bottleneck's algorithm in float64: gradcheck, and equality with torch's own autograd over random shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from units import activation, bottleneck, results, twin

from resfuse import calls, functional, reference
from resfuse.kernels import dispatch

pytestmark = pytest.mark.gate  # no speed is reported while these fail

SHORTCUTS = {
    "identity": {},
    "projection": dict(shortcut="projection", out_channels=12),
    "strided": dict(shortcut="projection", stride=2, out_channels=12),
    "strided v1": dict(shortcut="projection", stride=2, out_channels=12, v1=True),
}
MODES = {"train": dict(training=True), "frozen": dict(training=False)}
FORMS = {"covariance": 1, "recomputed": 10**9}


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Force one form of the wide products whatever the cost model says."""
    monkeypatch.setattr(calls.cost, "covariance_rows", lambda *_: FORMS[request.param])
    if request.param == "recomputed":
        monkeypatch.setattr(calls.cost, "has_covariance_form", lambda *_: False)
    return request.param


def flat_arguments(convs):
    """The differentiable tensors of a block, and a function that puts them back."""
    names = [(i, n) for i, c in enumerate(convs) for n in ("weight", "bias", "gamma", "beta")
             if getattr(c, n) is not None]

    def rebuild(tensors):
        blocks = list(convs)
        for (i, name), t in zip(names, tensors, strict=True):
            blocks[i] = blocks[i]._replace(**{name: t})
        return blocks

    return [getattr(convs[i], n) for i, n in names], rebuild


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("extra", [{}, dict(groups=2, dilation=2), dict(bias=True)], ids=["plain", "groups", "bias"])
def test_gradcheck(shortcut, mode, extra, form):
    convs = bottleneck(**SHORTCUTS[shortcut], **MODES[mode], **extra)
    tensors, rebuild = flat_arguments(convs)
    x = activation(2, 8, 5, 4).requires_grad_()
    # Smooth where the test looks: a kink of a ReLU within eps of an input would be nobody's error.
    assert torch.autograd.gradcheck(
        lambda x, *t: functional.bottleneck(x, *rebuild(t), backend="eager"), (x, *tensors), fast_mode=True
    )


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (3,), (0, 1), (0, 1, 2, 3)])
def test_each_batchnorm_is_frozen_by_itself(frozen, form):
    convs = tuple(
        c._replace(training=i not in frozen) for i, c in enumerate(bottleneck(shortcut="projection", bias=True))
    )
    compare(convs, activation(3, 8, 4, 5))


def layout(t):
    """Strides, of the dimensions that have more than one element."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def compare(convs, x, tolerance=1e-10, backend="eager"):
    other = twin(convs)
    x, y = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    out, expected = functional.bottleneck(x, *convs, backend=backend), reference.bottleneck(y, *other)
    assert out.shape == expected.shape and layout(out) == layout(expected) and out.dtype == expected.dtype
    dout = torch.randn(expected.shape, dtype=expected.dtype).contiguous(memory_format=torch.channels_last)
    ours, theirs = results(out, dout, x, convs), results(expected, dout, y, other)
    assert ours.keys() == theirs.keys()
    assert layout(ours["dx"]) == layout(theirs["dx"])
    for name, value in theirs.items():
        error = (ours[name].double() - value.double()).norm()
        assert error <= tolerance * (1 + value.double().norm()), f"{name}: {error}"


@given(
    n=st.integers(1, 3), h=st.integers(2, 9), w=st.integers(2, 9), width=st.integers(1, 7), groups=st.integers(1, 2),
    outer=st.integers(1, 19), stride=st.integers(1, 3), v1=st.booleans(), dilation=st.integers(1, 2),
    projection=st.booleans(), bias=st.booleans(), training=st.booleans(), channels_last=st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_equals_autograd_in_float64(
    n, h, w, width, groups, outer, stride, v1, dilation, projection, bias, training, channels_last
):
    """Ragged, odd and tiny shapes, whatever form the cost model picks."""
    stride = stride if projection else 1
    pixels = n * -(-h // stride) * -(-w // stride)
    if training and pixels < 3:  # two values a channel: every gradient before the shift is rounding
        return
    convs = bottleneck(
        outer, width * groups, outer + (3 if projection else 0), stride=stride, v1=v1, groups=groups,
        dilation=dilation, shortcut="projection" if projection else "identity", bias=bias, training=training,
    )
    compare(convs, activation(n, outer, h, w, channels_last=channels_last), tolerance=1e-8)


def test_several_parts_of_rows(form, monkeypatch, poisoned):
    from resfuse.kernels.eager import _rows

    monkeypatch.setitem(_rows._PART_ELEMENTS, "cpu", 64)
    monkeypatch.setattr(calls, "SMALL_SAMPLE", 0)  # NCHW a sample at a time, too
    for channels_last in (True, False):
        x = activation(3, 8, 7, 5, channels_last=channels_last)
        compare(bottleneck(shortcut="projection", stride=2, out_channels=12), x)


@pytest.mark.parametrize("missing", ["x", "weights", "first", "all but the last", "all"])
def test_gradients_that_are_not_needed(missing, form):
    """What requires no gradient gets none; the rest is as ever."""
    convs, x = bottleneck(shortcut="projection", bias=True), activation(2, 8, 4, 4)
    skip = {"x": (), "weights": range(4), "first": (0,), "all but the last": (0, 1), "all": range(4)}[missing]
    fields = ("weight",) if missing == "weights" else ("weight", "bias", "gamma", "beta")
    if missing in ("all", "x"):
        fields = fields if missing == "all" else ()
    other = twin(convs)
    for blocks in (convs, other):
        for i in skip:
            for name in fields:
                getattr(blocks[i], name).requires_grad_(False)
    needs_x = missing in ("weights", "all")
    ours, theirs = x.clone().requires_grad_(needs_x), x.clone().requires_grad_(needs_x)
    out, expected = functional.bottleneck(ours, *convs), reference.bottleneck(theirs, *other)
    dout = torch.randn(expected.shape, dtype=expected.dtype)
    a, b = results(out, dout, ours, convs), results(expected, dout, theirs, other)
    for name, value in b.items():
        assert (a[name] is None) == (value is None), name
        if value is not None:
            assert torch.allclose(a[name].double(), value.double(), rtol=1e-9, atol=1e-9), name


def test_backward_twice_with_retain_graph():
    convs, x = bottleneck(), activation(2, 8, 4, 4).requires_grad_()
    out = functional.bottleneck(x, *convs)
    dout = torch.randn_like(out)
    first = torch.autograd.grad(out, (x, convs[2].weight), dout, retain_graph=True)
    second = torch.autograd.grad(out, (x, convs[2].weight), dout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_double_backward(shortcut, mode):
    """A gradient penalty: the gradient of a gradient, in x and in a weight."""
    convs = bottleneck(**SHORTCUTS[shortcut], **MODES[mode], eps=0.1, bias=True)
    x = activation(2, 8, 4, 4)
    found = []
    for block, run in ((convs, functional.bottleneck), (twin(convs), reference.bottleneck)):
        leaf = x.clone().requires_grad_()
        out = run(leaf, *block)
        (dx,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        (out.sum() + dx.square().sum()).backward()
        found.append((leaf.grad, block[1].weight.grad, block[2].gamma.grad))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shortcut", ["identity", "projection"])
def test_autocast_is_the_explicit_cast_bit_for_bit(dtype, shortcut, form):
    """Statistics are those of the weights as the products read them, and autocast is off inside."""
    convs = bottleneck(shortcut=shortcut, dtype=torch.float32)
    x, found = activation(9, 8, 6, 6, dtype=torch.float32) + 3, []
    for cast in (False, True):
        block = twin(convs)
        if cast:
            block = tuple(c._replace(weight=c.weight.detach().to(dtype).requires_grad_()) for c in block)
        leaf = (x.to(dtype) if cast else x.clone()).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=not cast):
            out = functional.bottleneck(leaf, *block)
        torch.manual_seed(1)
        found.append(results(out, torch.randn(out.shape).to(out), leaf, block))
    for name, value in found[1].items():
        assert torch.equal(found[0][name].to(value.dtype), value), name


def spied(monkeypatch, primitive, backend="auto", dtype=torch.float64):
    """The arguments of each call of a primitive, as they come."""
    kernels, calls = dispatch.kernels(backend, "cpu", dtype), []
    working = getattr(kernels, primitive)
    monkeypatch.setattr(kernels, primitive, lambda *a, **k: calls.append((a, k)) or working(*a, **k))
    return calls


def test_no_mask_is_made_without_gradients(monkeypatch, form):
    calls = spied(monkeypatch, "expand" if form == "covariance" else "apply")
    with torch.no_grad():
        functional.bottleneck(activation(4, 8, 3, 3), *bottleneck())
    functional.bottleneck(activation(4, 8, 3, 3), *bottleneck())
    assert [positional[-1].mask for positional, _ in calls] == [False, True]


def test_the_covariance_is_kept_where_it_is_small(monkeypatch):
    for n, recomputed in ((2, 1), (400, 0)):
        out = functional.bottleneck(activation(n, 8, 4, 4), *bottleneck())
        with monkeypatch.context() as patch:
            calls = spied(patch, "covariance")
            out.sum().backward()
            assert len(calls) == recomputed


def test_gradients_that_nobody_wants_are_not_computed(monkeypatch, form):
    """Only a gamma of BatchNorm 2 is trained: no weight gradient, and nothing of the shortcut or of conv1."""
    convs = bottleneck(shortcut="projection")
    for i, c in enumerate(convs):
        for name in ("weight", "gamma", "beta"):
            getattr(c, name).requires_grad_((i, name) == (1, "gamma"))
    out = functional.bottleneck(activation(4, 8, 4, 4), *convs)
    products, backward = spied(monkeypatch, "expand_products"), spied(monkeypatch, "conv_backward")
    out.sum().backward()
    assert len(products) == (form == "covariance") and not any(needs[1] for (*_, needs, _), _ in backward)
    assert convs[1].gamma.grad is not None


def test_frozen_and_untrained_needs_no_products(monkeypatch):
    convs = bottleneck(training=False)
    for c in convs:
        for name in ("weight", "gamma", "beta"):
            getattr(c, name).requires_grad_(False)
    calls, found = spied(monkeypatch, "expand_products"), []
    for run in (functional.bottleneck, reference.bottleneck):
        x = activation(4, 8, 4, 4).requires_grad_()
        run(x, *convs).square().sum().backward()
        found.append(x.grad)
    assert not calls and torch.allclose(*found, rtol=1e-9)


def test_few_frozen_rows_are_expanded_all_the_same(monkeypatch):
    """Constant statistics need no covariance, so nothing speaks against the form that stores no product."""
    calls = spied(monkeypatch, "expand")
    functional.bottleneck(activation(1, 8, 2, 2), *bottleneck(training=False))
    assert len(calls) == 1


def test_a_strided_third_convolution():
    convs = bottleneck(shortcut="projection", stride=2, out_channels=12)
    convs = (convs[0], convs[1]._replace(stride=(1, 1)), convs[2]._replace(stride=(2, 2)), convs[3])
    compare(convs, activation(9, 8, 8, 8))


def test_a_train_step_between_an_eval_forward_and_its_backward():
    convs, x = bottleneck(), activation(4, 8, 4, 4)
    frozen = tuple(c._replace(training=False) for c in convs)
    expected = functional.bottleneck(x.clone().requires_grad_(), *twin(frozen))
    out = functional.bottleneck(x.requires_grad_(), *frozen)
    functional.bottleneck(x, *convs)
    out.sum().backward()
    assert torch.equal(out, expected) and x.grad is not None


@pytest.mark.parametrize("formats", [(False, 1, True), (False, 3, False), (True, 3, True)], ids=str)
def test_which_weight_decides_the_layout(formats):
    """x, the main branch's weights: any of them channels_last; the shortcut's does not count."""
    x_last, index, expected = formats
    convs = list(bottleneck(shortcut="projection"))
    weight = convs[index].weight.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    convs[index] = convs[index]._replace(weight=weight)
    out = functional.bottleneck(activation(2, 8, 4, 4, channels_last=x_last), *convs)
    theirs = reference.bottleneck(activation(2, 8, 4, 4, channels_last=x_last), *twin(convs))
    assert layout(out) == layout(theirs) and out.is_contiguous(memory_format=torch.channels_last) is expected


def test_the_input_and_the_incoming_gradient_are_not_written(form):
    convs, x = bottleneck(), activation(2, 8, 4, 4)
    before, leaf = x.clone(), x.requires_grad_()
    out = functional.bottleneck(leaf, *convs)
    dout = torch.randn_like(out)
    kept = dout.clone()
    out.backward(dout)
    assert torch.equal(leaf, before) and torch.equal(dout, kept)


def test_no_grad_keeps_nothing_and_gives_the_same_output():
    convs, x = bottleneck(), activation(2, 8, 4, 4)
    expected = functional.bottleneck(x, *twin(convs))
    with torch.no_grad():
        out = functional.bottleneck(x, *convs)
    assert out.grad_fn is None and torch.equal(out, expected)
