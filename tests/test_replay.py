"""Steps done again from notes: the same bits, one note for each kind of call; what cannot be noted runs as it is."""

import copy
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from units import TRITON, activation, triton_kernels

import resfuse
from resfuse.functional import conv_bn_add_relu
from resfuse.functions import replay, source
from resfuse.functions.notes import Notes
from resfuse.functions.source import Source
from resfuse.kernels import dispatch
from resfuse.testing.cases import CASES, make_block, make_gradient, make_input

NAMES = ("small-identity", "small-projection", "small-strided", "small-preact", "small-stem", "small-dense-layer",
         "small-scaled", "small-pooled")  # fmt: skip


@pytest.fixture(autouse=True)
def afresh():
    """Without what other tests noted, and without leaving them anything."""
    dispatch.kernels.cache_clear()
    yield
    dispatch.kernels.cache_clear()


@pytest.fixture(
    params=[
        "auto", pytest.param("triton", marks=[TRITON, pytest.mark.slow]),
        pytest.param("gpu", marks=[TRITON, pytest.mark.gpu]),
    ]  # fmt: skip
)
def backend(request, monkeypatch):
    if request.param == "triton":
        with triton_kernels(monkeypatch):
            yield "triton", "cpu"
    else:
        yield ("auto", "cpu") if request.param == "auto" else ("triton", "cuda")


def step(block, x, dout, autocast):
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        out = block(x)
    out.backward(dout.to(out.dtype))
    return [out.detach(), x.grad, *(p.grad for p in block.parameters()), *block.buffers()]


def kinds(backend, device, dtype):
    return dispatch.kernels(backend, device, dtype).replays


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits(name, autocast, backend, deterministic):
    """Of the first step, which runs as it is, the second, which is noted, and later ones, on operands of their own."""
    backend, device = backend
    if backend == "triton" and device == "cpu" and (name not in NAMES[1:5] or not autocast):
        pytest.skip("interpreted: the others tell no more")
    check_bits(name, autocast, backend, device)


@TRITON
def test_the_same_bits_interpreted(monkeypatch, deterministic):
    with triton_kernels(monkeypatch):
        check_bits("small-preact", True, "triton", "cpu")


def check_bits(name, autocast, backend, device):
    case = CASES[name]
    block = resfuse.fuse(make_block(case, device=device), config=resfuse.FuseConfig(backend=backend))
    for seed in range(2):
        x, dout = (make(case, seed=seed, device=device) for make in (make_input, make_gradient))
        first, *others = [step(copy.deepcopy(block), x, dout, autocast) for _ in range(4)]
        for other in others:
            assert all(map(torch.equal, first, other))
    found = [kind for dtype in (torch.float32, torch.bfloat16) for kind in kinds(backend, device, dtype).values()]
    assert found and all(map(callable, found))


def test_each_kind_of_call_is_noted_once(backend):
    backend, device = backend
    case = CASES["small-projection"]
    block = resfuse.fuse(make_block(case, device=device), config=resfuse.FuseConfig(backend=backend))
    x, dout = make_input(case, device=device), make_gradient(case, device=device)
    for _ in range(5):
        step(block, x, dout, False)
    found = kinds(backend, device, torch.float32)
    assert len(found) == 3  # forward, backward, running statistics
    block.eval()
    with torch.no_grad():
        expected = block(x)
        assert all(torch.equal(block(x), expected) for _ in range(3))
        assert len(found) == 4
        assert torch.allclose(block(x[:1]), expected[:1], atol=1e-5)
    assert len(found) == 5


def test_what_is_wanted_and_how_buffers_move_is_part_of_the_kind():
    case = CASES["small-identity"]
    x, dout = make_input(case), make_gradient(case)
    block, plain = resfuse.fuse(make_block(case)), make_block(case)
    for each in (block, plain):
        each.conv1.weight.requires_grad_(False)
    for round in range(7):
        if round == 4:  # notes of both steps are there
            for each in (block, plain):
                each.conv1.weight.requires_grad_(True)
                each.bn2.momentum = 0.7
        ours, theirs = (step(each, x, dout, False) for each in (block, plain))
        assert [t is None for t in ours] == [t is None for t in theirs]
        pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if b is not None]
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs)


def test_an_operand_given_twice_is_another_kind():
    """x as its own residual, and then another: notes of the first would add x again."""
    block = make_block(CASES["small-identity"]).eval()
    convs = resfuse.blocks.resnet.convs(resfuse.fuse(block))
    x, other = make_input(CASES["small-identity"]), make_input(CASES["small-identity"], seed=1)
    for _ in range(3):
        same = conv_bn_add_relu(x, *convs, shortcut=x)
    for _ in range(3):
        different = conv_bn_add_relu(x, *convs, shortcut=other)
    main = conv_bn_add_relu(x, *convs, shortcut=torch.zeros_like(x), relu=False)
    assert torch.allclose(same, (main + x).relu(), atol=1e-5)
    assert torch.allclose(different, (main + other).relu(), atol=1e-5)


def test_what_cannot_be_noted_runs_as_it_is():
    """A tensor from elsewhere, whose memory may be another's next time; a decision by what a tensor holds."""
    elsewhere = torch.ones(3)
    for function in (lambda x: x + elsewhere, lambda x: x + 1 if x.sum().item() > 0 else x - 1):
        k = SimpleNamespace(replays={})
        for value in (1.0, 1.0, 1.0, -1.0):
            x = torch.full((3,), value)
            assert torch.equal(replay.run(k, "step", None, [x], partial(function, x)), function(x))
        assert list(k.replays.values()) == [replay.NEVER]


def test_what_is_not_read_is_left_out_and_nothing_is_held():
    weight, x = torch.randn(4, 4), torch.randn(8, 4)

    def call():
        unread = x.new_empty(100).view(10, 10)
        first = x @ weight.to(torch.float64).to(torch.float32).t()
        second = x @ weight.to(torch.float64).to(torch.float32).t()
        assert unread.shape == (10, 10)
        return (first + second, x)

    with Notes([x, weight]) as notes:
        result = call()
    text = Source(*notes.kept(result), notes.count, notes.operands).text()
    assert text.count("dtype=") == 3, "a weight's first cast is made once"
    assert "(100,)" not in text, "what is not read is left out"
    made = re.findall(r"(v\d+_\d+) = ", text)
    dead = re.findall(r"v\d+_\d+", " ".join(re.findall(r"del (.*)", text)))
    assert len(made) == 8 and set(dead) == set(made[:-1]), "all but the result are dropped"
    again = source.steps(notes, result)
    assert all(map(torch.equal, again(None, x, weight), call()))


@TRITON
def test_kernels_are_given_addresses(monkeypatch):
    """As on a GPU, where a compiled kernel is run with those: small tensors that only kernels see have one memory."""
    from resfuse.kernels.interface import STREAM, Started
    from resfuse.kernels.triton import _launch

    given = []

    def run(programs, stream, kernel, *operands):
        given.append((kernel.fn.__name__, operands))

    def started(kernel, programs, like, args, options):
        return Started(run, (programs, STREAM, kernel), (*args, *options.values()), True)

    case = CASES["small-identity"]
    with triton_kernels(monkeypatch):
        monkeypatch.setattr(_launch, "_started", started)
        block = resfuse.fuse(make_block(case), config=resfuse.FuseConfig(backend="triton"))
        x, dout = make_input(case), make_gradient(case)
        for _ in range(3):
            step(block, x, dout, False)
    names = [name for name, _ in given]
    assert names.count("_conv_stats") == 1 and names.count("_expand") == 1 and names.count("_update_running") == 1
    a, weight, *_ = dict(given)["_conv_stats"]
    assert a[0] == x.data_ptr() and weight == block.conv1.weight.data_ptr() and a[1:] == (None,) * 3
    (_, scale, shift, _), *_ = next(operands for name, operands in given if name == "_apply")
    assert shift - scale == 4 * block.bn1.num_features  # views of one tensor, which are not made


def test_another_alignment_is_another_kind():
    """Kernels are compiled for what an address is a multiple of."""
    k, seen = SimpleNamespace(replays={}), set()
    for offset in (0, 1):
        x = torch.zeros(20)[offset : offset + 8]
        seen.add(x.data_ptr() % 16)
        replay.run(k, "step", None, [x], partial(torch.add, x, 1))
    assert len(k.replays) == len(seen) == 2


def test_notes_are_bounded(monkeypatch):
    monkeypatch.setattr(replay, "MOST", 8)
    k = SimpleNamespace(replays={})
    for n in range(1, 30):
        replay.run(k, "step", None, [activation(1, 1, 1, n)], lambda: None)
        assert len(k.replays) <= 8
