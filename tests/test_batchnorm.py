"""BatchNorm's whole semantics, and buffers that a raising call leaves alone."""

import pytest
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck
from units import BUFFERS, activation, bottleneck, twin

import resfuse
from resfuse import functional, reference

NORMS = ("bn1", "bn2", "bn3")


def block_and_twin(change=lambda norm: None, **settings):
    """A fused float64 block and its eager twin, `change` applied to each BatchNorm of both."""
    torch.manual_seed(1)
    block = Bottleneck(16, 4, **settings).double()
    for name in NORMS:
        norm = getattr(block, name)
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
        if norm.running_mean is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        change(norm)
    eager = Bottleneck(16, 4, **settings).double()
    for name in NORMS:
        change(getattr(eager, name))
    eager.load_state_dict(block.state_dict())
    eager.train(block.training)
    for name in NORMS:
        getattr(eager, name).training = getattr(block, name).training
    return resfuse.fuse(block), eager


def steps(block, count=3):
    """Outputs and gradients of a few steps; the same inputs for every block."""
    found = []
    for seed in range(count):
        x = activation(3, 16, 5, 4, seed=seed).requires_grad_()
        out = block(x)
        out.square().sum().backward()
        found += [out.detach(), x.grad]
    return found + [p.grad for p in block.parameters()]


def agree(change=lambda norm: None, **settings):
    block, eager = block_and_twin(change, **settings)
    for ours, theirs in zip(steps(block), steps(eager), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-9)
    assert not block.resfuse_state.fallbacks
    assert block.state_dict().keys() == eager.state_dict().keys()
    for (name, ours), theirs in zip(block.state_dict().items(), eager.state_dict().values(), strict=True):
        assert ours.dtype == theirs.dtype and torch.allclose(ours, theirs, rtol=1e-10), name
    return block


def test_train_mode_updates_as_torch_does():
    block = agree()
    assert block.bn2.num_batches_tracked == 3


def test_tracking_switched_off_later_leaves_the_buffers():
    agree(lambda norm: setattr(norm, "track_running_stats", False))


@pytest.mark.parametrize("momentum", [None, 0.0, 0.3, 1.0])
def test_momentum(momentum):
    agree(lambda norm: setattr(norm, "momentum", momentum))


@pytest.mark.parametrize("eps", [1e-3, 0.1])
def test_eps(eps):
    agree(lambda norm: setattr(norm, "eps", eps))


def test_momentum_and_eps_are_read_at_each_call():
    block, eager = block_and_twin()
    for b in (block, eager):
        steps(b, 1)
        b.bn1.eps, b.bn2.momentum = 0.5, 0.9
    for ours, theirs in zip(steps(block, 1), steps(eager, 1), strict=True):
        assert torch.allclose(ours, theirs)
    assert torch.allclose(block.bn2.running_var, eager.bn2.running_var)


@pytest.mark.parametrize("settings", [dict(affine=False), dict(track_running_stats=False)])
@pytest.mark.parametrize("training", [True, False])
def test_without_affine_or_without_buffers(settings, training):
    agree(lambda norm: norm.train(training), norm_layer=lambda c: nn.BatchNorm2d(c, **settings))


def test_eval_mode_with_gradients_leaves_buffers():
    block = agree(lambda norm: norm.eval())
    assert block.bn1.num_batches_tracked == 0


@pytest.mark.parametrize("frozen", NORMS)
def test_one_frozen_batchnorm_keeps_its_counter(frozen):
    block, eager = block_and_twin()
    for b in (block, eager):
        getattr(b, frozen).eval()
    for ours, theirs in zip(steps(block), steps(eager), strict=True):
        assert torch.allclose(ours, theirs)
    assert [int(getattr(block, n).num_batches_tracked) for n in NORMS] == [0 if n == frozen else 3 for n in NORMS]


def test_momentum_none_without_a_counter_stands_still_as_in_torch():
    def change(norm):
        norm.momentum, norm.num_batches_tracked = None, None

    block, eager = block_and_twin(change)
    steps(block), steps(eager)
    assert torch.allclose(block.bn1.running_mean, eager.bn1.running_mean)


def test_frozen_batchnorm_of_torchvision():
    from torchvision.ops import FrozenBatchNorm2d

    agree(norm_layer=lambda c: _affine(FrozenBatchNorm2d(c)))


def _affine(norm):
    norm.affine, norm.training = False, False  # what this file's builder asks of a norm
    norm.weight.uniform_(0.5, 1.5)
    return norm


@pytest.mark.parametrize("case", ["first", "after the stride", "no buffers in eval"])
def test_one_value_per_channel_raises_torchs_error_and_changes_nothing(case):
    stride, size = (2, 2) if case == "after the stride" else (1, 1)
    convs = bottleneck(shortcut="projection", stride=stride)
    if case == "no buffers in eval":
        convs = tuple(c._replace(training=False, running_mean=None, running_var=None) for c in convs)
    before, x = twin(convs), activation(1, 8, size, size)
    with pytest.raises(ValueError) as theirs:
        reference.bottleneck(x, *twin(convs))
    with pytest.raises(ValueError) as ours:
        functional.bottleneck(x, *convs)
    assert str(ours.value) == str(theirs.value)
    for a, b in zip(convs, before, strict=True):
        for name in BUFFERS:
            assert getattr(a, name) is getattr(b, name) is None or torch.equal(getattr(a, name), getattr(b, name))


def test_a_counter_without_buffers_advances():
    convs = tuple(c._replace(running_mean=None, running_var=None) for c in bottleneck())
    functional.bottleneck(activation(2, 8, 4, 4), *convs)
    assert [int(c.num_batches_tracked) for c in convs] == [4, 4, 4]


def test_saving_for_backward_that_fails_changes_no_buffer():
    def pack(tensor):
        raise torch.OutOfMemoryError("injected")

    convs = bottleneck()
    before = twin(convs)
    with pytest.raises(torch.OutOfMemoryError), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        functional.bottleneck(activation(2, 8, 4, 4), *convs)
    for a, b in zip(convs, before, strict=True):
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in BUFFERS)


PRIMITIVES_OF_A_FORWARD = ("conv_stats", "prepare", "covariance", "expand_stats", "finalize", "expand")


@pytest.mark.parametrize("primitive", PRIMITIVES_OF_A_FORWARD)
@pytest.mark.parametrize("call", range(4))
def test_a_forward_that_fails_anywhere_changes_no_buffer(primitive, call, monkeypatch):
    from resfuse.kernels import dispatch

    kernels = dispatch.kernels("eager", "cpu", torch.float64)
    working, calls = getattr(kernels, primitive), iter(range(100))

    def failing(*args, **kwargs):
        if next(calls) == call:
            raise torch.OutOfMemoryError("injected")
        return working(*args, **kwargs)

    convs, x = bottleneck(shortcut="projection"), activation(9, 8, 4, 4)
    before = twin(convs)
    monkeypatch.setattr(kernels, primitive, failing)
    try:
        functional.bottleneck(x, *convs, backend="eager")
    except torch.OutOfMemoryError:
        for a, b in zip(convs, before, strict=True):
            assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in BUFFERS)
    else:
        assert call >= 1 and next(calls) <= call + 1, "the failure was never reached, though there were calls enough"


def test_a_failing_update_changes_no_buffer():
    """The last BatchNorm's buffer cannot be written to in its shape: the first ones stay as they were."""
    from resfuse.kernels.eager.update_running import update_running
    from resfuse.kernels.interface import RunningUpdate, Stats

    good, bad = torch.zeros(3), torch.zeros(4)
    stats = Stats(torch.ones(3), torch.ones(3))
    counter = torch.tensor(0)
    with pytest.raises(RuntimeError):
        update_running([RunningUpdate(stats, 5, good, good.clone(), counter, 0.1),
                        RunningUpdate(stats, 5, bad, bad, None, 0.1)])
    assert not good.any() and counter == 0
