"""The per-call gate: nothing that a plan would refuse gets past the record of what was seen last."""

import copy
import gc
import timeit
import weakref

import pytest
import torch
from torch import nn
from torchvision.models import resnet50
from torchvision.models.resnet import Bottleneck
from units import NATIVE

import resfuse
from resfuse.blocks import gate

X = torch.randn(2, 16, 5, 5)


def bottleneck():
    downsample = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
    block = resfuse.fuse(Bottleneck(16, 4, downsample=downsample))
    block.conv3.register_full_backward_hook(lambda *_: None).remove()  # it leaves an attribute
    return block


class Convolution(nn.Conv2d):
    """Not what a plan reads."""


def replaced(block):
    block.conv2 = Convolution(4, 4, 3, padding=1, bias=False)


def of_another_class(block):
    block.conv2.__class__ = Convolution


def hooked(block):
    block.bn3.register_forward_hook(lambda *_: None)


def hooked_in_a_new_dictionary(block):
    block.conv1._forward_pre_hooks = type(block.conv1._forward_pre_hooks)()
    block.conv1.register_forward_pre_hook(lambda *_: None)


def hooked_before(block):
    block.relu.register_forward_pre_hook(lambda *_: None)


def hooked_behind(block):
    block.conv3.register_full_backward_hook(lambda *_: None)


def hooked_behind_and_before(block):
    block.bn2.register_full_backward_pre_hook(lambda *_: None)


def deeply_hooked(block):
    block.downsample[1].register_full_backward_hook(lambda *_: None)


def own_forward(block):
    block.bn2.forward = lambda x: x


def other_padding(block):
    block.conv2.padding_mode = "circular"


def other_parameter(block):
    class Weight(nn.Parameter):
        pass

    block.conv3.weight = Weight(block.conv3.weight.data)


def longer_shortcut(block):
    block.downsample.append(nn.Identity())


def no_shortcut(block):
    block.downsample = nn.Identity()


def shared_norm(block):
    block.bn2 = block.bn1


CODES = {
    replaced: "module_type", of_another_class: "module_type", hooked: "inner_hook",
    hooked_before: "inner_hook", hooked_behind: "inner_hook", hooked_behind_and_before: "inner_hook",
    hooked_in_a_new_dictionary: "inner_hook", deeply_hooked: "inner_hook", own_forward: "own_forward",
    other_padding: "padding", other_parameter: "parameter_type", longer_shortcut: "downsample",
    no_shortcut: "downsample", shared_norm: "shared_norm",
}  # fmt: skip


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=NATIVE), False], ids=["compiled", "python"])
@pytest.mark.parametrize("change", CODES, ids=lambda change: change.__name__)
def test_a_change_is_seen_at_the_next_call(change, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(gate, "comparison", lambda: None)
    block = bottleneck()
    block(X), block(X)
    assert (block.resfuse_state.record is not None) == compiled and not block.resfuse_state.fallbacks
    change(block)
    with torch.no_grad():
        block(X)
    assert set(block.resfuse_state.fallbacks) == {CODES[change]}


@NATIVE
def test_what_a_plan_does_not_read_closes_the_gate_for_one_call_only(monkeypatch):
    block, asked = bottleneck(), []
    refusal = block.plan.refusal
    monkeypatch.setattr(block.plan, "refusal", lambda block: asked.append(1) or refusal(block))
    block(X)
    for change in (block.eval, lambda: setattr(block.bn1, "eps", 0.1), lambda: setattr(block, "tag", 1)):
        change()
        for _ in range(3):
            block(X)
    assert len(asked) == 1 + 3
    optimizer = torch.optim.SGD(block.parameters(), 0.1)
    block.train()(X).sum().backward()
    optimizer.step()
    block(X)
    assert len(asked) == 1 + 3 + 1 and not block.resfuse_state.fallbacks


def test_copies_share_no_record_and_nothing_is_kept_alive():
    block = bottleneck()
    block(X)
    assert copy.deepcopy(block).resfuse_state.record is None
    died = weakref.ref(block), weakref.ref(block.conv2.weight)
    gc.disable()  # by counts alone
    try:
        del block
        assert [reference() for reference in died] == [None, None]
    finally:
        gc.enable()


@NATIVE
def test_it_is_cheap():
    """Measured by benchmarks/overhead.py: a tenth of a second and 3 us are what is asked for."""
    model = resnet50()
    assert min(timeit.repeat(lambda: resfuse.fuse(resfuse.unfuse(model)), number=1, repeat=5)) < 0.1
    block, x = model.layer1[0], torch.randn(1, 64, 8, 8)
    assert min(timeit.repeat(lambda: block._refusal(x), number=200, repeat=40)) / 200 < 10e-6
