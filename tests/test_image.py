"""A ResNet's stem whose convolution of an image is the kernel set's own."""

import copy

import pytest
import torch
from units import TRITON, triton_kernels

import resfuse
from resfuse.blocks.modules import Stem
from resfuse.testing.cases import CASES, make_block, make_input
from resfuse.testing.tolerances import relative_error

pytestmark = TRITON
CASE = CASES["small-stem"]
OWN = {"_padded", "_conv_few", "_few_wgrad"}


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.gpu)], ids=["interpreted", "gpu"])
def runner(request, monkeypatch):
    with triton_kernels(monkeypatch, gpu=request.param) as running:
        yield running


def stems():
    """Eager and fused, with the same weights."""
    torch.manual_seed(0)
    block = make_block(CASE)
    assert isinstance(block, Stem)
    return copy.deepcopy(block), resfuse.fuse(block, config=resfuse.FuseConfig(backend="triton"))


def step(block, x, bf16=True):
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = block(x)
    out.float().square().mean().backward()
    return out.detach().float(), *(p.grad for p in block.parameters()), *block.buffers()


@pytest.mark.parametrize("image_wanted", [False, True])
def test_a_step(image_wanted, runner):
    """As near to float64 as eager's is, buffers and the image's gradient too; replayed from notes the same bits."""
    (eager, fused), x = stems(), make_input(CASE, torch.float32)
    exact = copy.deepcopy(eager).double()
    wanted = [copy.deepcopy(x).requires_grad_(image_wanted) for _ in range(3)]
    truth = step(exact, wanted[0].double().detach().requires_grad_(image_wanted), bf16=False)
    theirs, ours = step(eager, wanted[1]), step(copy.deepcopy(fused), wanted[2])
    for t, e, o in zip(truth, theirs, ours, strict=True):
        assert relative_error(o, t) <= 1.5 * relative_error(e, t) + 1e-6
    if image_wanted:
        assert relative_error(wanted[2].grad, wanted[1].grad) < 0.05
    assert set(runner.launches) >= OWN and "_bn_stats" not in runner.launches
    again = [step(copy.deepcopy(fused), copy.deepcopy(x).requires_grad_(image_wanted)) for _ in range(3)]
    assert all(torch.equal(a, b) for found in again for a, b in zip(found, ours, strict=True))


def test_evaluation(runner):
    (eager, fused), x = stems(), make_input(CASE, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fused.eval()(x), eager.eval()(x)
    assert relative_error(ours, theirs) < 0.02 and "_conv_few" in runner.launches


def test_gradients_of_gradients(runner):
    (eager, fused), x = stems(), make_input(CASE, torch.float32)
    found = []
    for block in (eager, fused):
        with torch.autocast("cpu", torch.bfloat16):
            out = block(x)
        (first,) = torch.autograd.grad(out.float().square().mean(), block.conv.weight, create_graph=True)
        first.square().sum().backward()
        found.append(block.conv.weight.grad)
    assert relative_error(found[1], found[0]) < 0.1


@pytest.mark.parametrize("what", ["hook", "bias", "float32", "contiguous"])
def test_what_is_left_to_torch(what, runner):
    (eager, fused), x, seen = stems(), make_input(CASE, torch.float32), []
    for block in (eager, fused):
        if what == "bias":
            block.conv.bias = torch.nn.Parameter(torch.ones(block.conv.out_channels))
        if what == "contiguous":
            block.to(memory_format=torch.contiguous_format)
        if what == "hook":
            block.conv.register_forward_hook(lambda *_: seen.append(1))
    x = x.contiguous() if what == "contiguous" else x
    ours, theirs = (step(block, x, bf16=what != "float32") for block in (fused, eager))
    assert ours[0].stride() == theirs[0].stride()
    assert relative_error(ours[0], theirs[0]) < 0.02
    assert not OWN & set(runner.launches) and len(seen) == (2 if what == "hook" else 0)


def test_an_image_that_does_not_fit(runner):
    _, fused = stems()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises((ValueError, RuntimeError)):
        fused(torch.randn(1, 5, 8, 8))
