"""Runs and their plans where a model is not as simple as it might be."""

import copy

import pytest
import torch
import torchvision
from test_lean import bottlenecks, fail_at_the_sixth_convolution, fused, image, make, same_bits
from torch import nn
from torchvision.models.resnet import Bottleneck
from units import conv_bn

import resfuse
from resfuse.blocks import modules
from resfuse.functional import Block, conv_bn_add_relu, run

SIZE = 2, 3, 64, 64


def lean(model, memory="lean", size=SIZE):
    return resfuse.fuse(model, config=resfuse.FuseConfig(memory=memory), input_size=size)


def test_stochastic_depth_is_counted():
    timm = pytest.importorskip("timm")
    report = resfuse.report(lean(timm.create_model("resnet26", drop_path_rate=0.1)))
    assert len(report.runs) == 4 and [note.code for note in report.notes][-1] == "peak"


def test_a_model_without_data_is_counted():
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    counted, like = (resfuse.report(lean(m, 0.8)).notes for m in (model, torchvision.models.resnet50()))
    assert [note for note in counted if note.code == "peak"] == [note for note in like if note.code == "peak"] != []


def test_a_stem_of_several_convolutions_keeps_what_it_keeps():
    model = torchvision.models.resnet18()
    model.conv1 = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 64, 3, 1, 1))
    runs = resfuse.report(lean(model, "leanest")).runs
    assert [name for name, _ in runs] == [f"layer{i}" for i in range(1, 5)]
    model(torch.randn(SIZE)).sum().backward()


def test_a_model_in_evaluation_is_counted_as_it_trains():
    model = torchvision.models.resnet50()
    model.layer1[0].bn1.eval()
    modes = [module.training for module in model.modules()]
    trained = resfuse.report(lean(copy.deepcopy(model), 0.8)).notes
    model.eval()
    evaluated = lean(copy.deepcopy(model), 0.8)
    assert not any(module.training for module in evaluated.modules())
    assert [note.text for note in resfuse.report(evaluated).notes if note.code == "peak"] == [
        note.text for note in trained if note.code == "peak"
    ]  # fmt: skip
    assert modes.count(False) == 1


class Iterated(nn.Module):
    """As a stage of Hugging Face's ResNets."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(Bottleneck(16, 4) for _ in range(4)))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_row_that_is_never_called_as_a_whole_is_counted_so():
    size = 4, 16, 8, 8
    (peak,) = (note.text for note in resfuse.report(lean(Iterated(), "leanest", size)).notes if note.code == "peak")
    assert peak.startswith("1.00 of eager's")
    with pytest.raises(ValueError, match="the least possible peak"):
        lean(Iterated(), 0.35, size)


@pytest.mark.parametrize("wide", [True, False], ids=["wide", "narrow"])
def test_two_1x1s_keep_what_the_second_is_made_of(wide):
    widths = (8, 24) if wide else (24, 8)
    blocks = [
        Block((conv_bn(widths[1], widths[0], seed=i), conv_bn(widths[0], widths[1], seed=i + 9)), None, True)
        for i in range(3)
    ]  # fmt: skip
    x = torch.randn(3, widths[1], 6, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    expected = out = x.clone().requires_grad_()
    for block in blocks:
        out = conv_bn_add_relu(out, *block.convs)
    leaves = [p for block in blocks for conv in block.convs for p in (conv.weight, conv.gamma, conv.beta)]
    theirs = torch.autograd.grad(out.sin().sum(), [expected, *leaves])
    found = x.clone().requires_grad_()
    ours = torch.autograd.grad(run(found, blocks, leanest=True).sin().sum(), [found, *leaves])
    assert all(map(torch.equal, ours, theirs))


def test_a_piece_that_does_not_fit_is_done_by_its_blocks_alone():
    row = nn.Sequential(modules.ResidualBlock(8, 8), nn.Identity(), modules.ResidualBlock(8, 8))
    row[2].scale = -1.0  # which no kernel divides by
    eager, ours = copy.deepcopy(row), fused(row, "lean")
    x = image()
    torch.testing.assert_close(ours(x), eager(x))
    assert int(ours[0].bn1.num_batches_tracked) == 1
    torch.testing.assert_close(dict(ours.named_buffers()), dict(eager.named_buffers()))
    assert {code for _, code, *_ in resfuse.report(ours).splits} == {"not_a_block", "argument"}


def test_a_parameter_written_to_between_the_blocks_backwards_is_noticed():
    model, x = fused(bottlenecks(), "leanest"), image().requires_grad_()
    weight = model[0].conv2.weight

    def write(_):
        weight.detach().mul_(2)

    handle = model[2].conv1.weight.register_post_accumulate_grad_hook(write)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(x).sum().backward()
    handle.remove()
    model(x).sum().backward()


def test_a_run_that_fails_behind_frozen_blocks_has_changed_nothing(monkeypatch):
    model = fused(make("bottlenecks"), "lean", "eager")
    model[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    fail_at_the_sixth_convolution(monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        model(image())
    same_bits(model.state_dict(), before)
