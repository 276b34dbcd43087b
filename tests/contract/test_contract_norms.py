"""Lines 5 to 11: BatchNorm's settings, one by one, as stock BatchNorm has them."""

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d
from twins import BLOCKS, alike, fell_back, operands, step, twins


def norms(block):
    return [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]


@BLOCKS
def test_05_each_batchnorm_trains_by_itself(name):
    for frozen in range(len(norms(twins(name)[0]))):
        eager, fused = twins(name)
        for block in (eager, fused):
            norms(block)[frozen].eval()
        found = step(fused, *operands(name))
        alike(found, step(eager, *operands(name)))
        assert [m.num_batches_tracked.item() for m in norms(fused)].count(0) <= 1
        assert not fell_back(fused)


@BLOCKS
def test_06_eps_and_momentum_are_read_at_each_call(name):
    eager, fused = twins(name)
    for eps, momentum in ((1e-3, 0.5), (0.1, 0.01)):
        for norm in (*norms(eager), *norms(fused)):
            norm.eps, norm.momentum = eps, momentum
        alike(step(fused, *operands(name)), step(eager, *operands(name)))


@BLOCKS
@pytest.mark.parametrize("setting", ["momentum=None", "affine=False", "track_running_stats=False"])
def test_07_settings_of_batchnorm(name, setting):
    eager, fused = twins(name)
    for norm in (*norms(eager), *norms(fused)):
        if setting == "momentum=None":
            norm.momentum = None
        elif setting == "affine=False":
            norm.affine, norm.weight, norm.bias = False, None, None
        else:
            norm.track_running_stats = False
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    for _ in range(2):
        alike(step(fused, *operands(name)), step(eager, *operands(name)))


@BLOCKS
def test_08_one_value_per_channel_raises_torchs_error(name):
    eager, fused = twins(name)
    x = operands(name)[0][:1, :, :1, :1]
    messages = []
    for block in (eager, fused):
        before = {n: b.clone() for n, b in block.named_buffers()}
        with pytest.raises(ValueError, match="Expected more than 1 value per channel") as error:
            block(x)
        messages.append(str(error.value))
        if block is fused:
            assert all(torch.equal(b, before[n]) for n, b in block.named_buffers()), "something was half-updated"
    assert messages[0] == messages[1]


@BLOCKS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_09_an_empty_batch_is_as_eager(name, training):
    x = operands(name)[0][:0]
    results = []
    for block in twins(name):
        block.train(training)
        try:
            out = block(x)
            results.append((out.shape, {n: b.clone() for n, b in block.named_buffers()}))
        except Exception as error:
            results.append((type(error), str(error)))
    if isinstance(results[0][0], type):
        assert results[0] == results[1]
    else:
        assert results[0][0] == results[1][0]
        alike(results[1][1], results[0][1])


@BLOCKS
def test_10_gradients_in_evaluation(name):
    eager, fused = twins(name)
    eager.eval(), fused.eval()
    alike(step(fused, *operands(name)), step(eager, *operands(name)))


def test_10_frozen_batchnorm_of_torchvision():
    from torchvision.models.resnet import Bottleneck

    import resfuse

    torch.manual_seed(0)
    eager = Bottleneck(16, 4, norm_layer=FrozenBatchNorm2d)
    for name, buffer in eager.named_buffers():
        buffer.uniform_(0.5, 1.5) if "var" in name or "weight" in name else buffer.normal_()
    fused = Bottleneck(16, 4, norm_layer=FrozenBatchNorm2d)
    fused.load_state_dict(eager.state_dict())
    resfuse.fuse(fused)
    x, dout = torch.randn(2, 16, 5, 5), torch.randn(2, 16, 5, 5)
    alike(step(fused, x, dout), step(eager, x, dout))


@BLOCKS
def test_11_no_gradient_for_what_asks_for_none(name):
    eager, fused = twins(name)
    for block in (eager, fused):
        for parameter in list(block.parameters())[::2]:
            parameter.requires_grad_(False)
    found = step(fused, *operands(name))
    alike(found, step(eager, *operands(name)))
    assert sum(p.grad is not None for p in fused.parameters()) == sum(p.requires_grad for p in fused.parameters())
