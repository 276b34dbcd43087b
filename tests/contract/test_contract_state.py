"""Lines 1 to 4, 12 and 18: a fused block has its twin's state, and nothing of it goes stale."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from twins import BLOCKS, alike, is_fused, operands, step, twins

import resfuse


@BLOCKS
def test_01_state_dict_keys_order_and_strict_loading_both_ways(name):
    eager, fused = twins(name)
    assert list(eager.state_dict()) == list(fused.state_dict())
    other, _ = twins(name, seed=1)
    fused.load_state_dict(other.state_dict(), strict=True)
    alike(step(fused, *operands(name)), step(other, *operands(name)))
    fused.load_state_dict(copy.deepcopy(eager.state_dict()), strict=True, assign=True)
    eager.load_state_dict(fused.state_dict(), strict=True)
    alike(step(fused, *operands(name)), step(eager, *operands(name)))


@BLOCKS
def test_02_an_optimizer_built_before_fuse_works(name):
    eager, _ = twins(name)
    ours = copy.deepcopy(eager)
    tensors = {id(t) for t in (*ours.parameters(), *ours.buffers())}
    optimizers = [torch.optim.SGD(block.parameters(), 0.1, momentum=0.9) for block in (eager, ours)]
    resfuse.fuse(ours)
    assert {id(t) for t in (*ours.parameters(), *ours.buffers())} == tensors
    for _ in range(2):
        for block, optimizer in zip((eager, ours), optimizers, strict=True):
            step(block, *operands(name))
            optimizer.step()
    alike(dict(ours.state_dict()), dict(eager.state_dict()))


def saved(block):
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda block: pickle.loads(pickle.dumps(block)), "torch.save": saved}


@BLOCKS
@pytest.mark.parametrize("way", COPIES)
def test_03_copies_are_fused_and_their_own(name, way):
    eager, fused = twins(name)
    twin = COPIES[way](fused)
    assert is_fused(twin) and type(twin) is type(fused)
    alike(step(twin, *operands(name)), step(eager, *operands(name)))
    assert all(p.grad is None for p in fused.parameters()), "it shares parameters"


@BLOCKS
def test_03_averaged_models(name):
    eager, fused = twins(name)
    averages = [AveragedModel(block, use_buffers=True) for block in (eager, fused)]
    for block, average in zip((eager, fused), averages, strict=True):
        with torch.no_grad():
            for p in block.parameters():
                p.mul_(1.5)
        average.update_parameters(block)
        average.update_parameters(block)
    assert is_fused(averages[1].module)
    alike(*(step(average.module, *operands(name)) for average in reversed(averages)))


@BLOCKS
def test_03_timms_averaged_models(name):
    timm_utils = pytest.importorskip("timm.utils")
    eager, fused = twins(name)
    averages = []
    for block in (fused, eager):
        average = timm_utils.ModelEmaV3(block, decay=0.5)
        step(block, *operands(name))
        with torch.no_grad():
            for p in block.parameters():
                p.mul_(1.5)
        average.update(block, step=10)
        averages.append(step(average.module, *operands(name)))
        assert is_fused(average.module) == is_fused(block)
    alike(*averages)


@BLOCKS
@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16, torch.channels_last], ids=str)
def test_04_to_afterwards(name, to):
    eager, fused = twins(name)
    for block in (eager, fused):
        block.to(memory_format=to) if to == torch.channels_last else block.to(to)
    dtype = torch.float32 if to == torch.channels_last else to
    x, dout = operands(name, dtype)
    alike(step(fused, x, dout), step(eager, x, dout), 0.1 if to == torch.bfloat16 else 1e-4)


@BLOCKS
def test_12_parameters_that_change_are_seen(name):
    eager, fused = twins(name)
    step(fused, *operands(name))
    step(eager, *operands(name))
    for block in (eager, fused):
        for p in block.parameters():
            p.data = p.data * 1.1
        for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_var.data.mul_(2)
    alike(step(fused, *operands(name)), step(eager, *operands(name)))
    eager.eval(), fused.eval()
    alike(step(fused, *operands(name)), step(eager, *operands(name)))


@BLOCKS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_18_the_input_is_never_modified(name, training):
    _, fused = twins(name)
    fused.train(training)
    x, dout = operands(name)
    before, version = x.detach().clone(), x._version
    fused(x).backward(dout)
    assert torch.equal(x, before) and x._version == version and not x.grad.isnan().any()
