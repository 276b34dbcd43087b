"""Blocks of libraries that are not installed with the tests: stand-ins with their names and forwards, which run always,
and the real ones where they are."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resfuse
from resfuse.bench.agreement import agreement

WIDTH = 8


def named(module, name=None):
    """A class as if it were defined elsewhere: that is what blocks are known by."""

    def rename(cls):
        cls.__module__, cls.__qualname__ = module, name or cls.__name__
        return cls

    return rename


@named("detectron2.layers.wrappers", "Conv2d")
class Conv(nn.Conv2d):
    def __init__(self, *args, norm=None, activation=None, **kwargs):
        super().__init__(*args, bias=norm is None, **kwargs)
        self.norm, self.activation = norm, activation

    def forward(self, x):
        x = super().forward(x)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


@named("detectron2.layers.batch_norm")
class FrozenBatchNorm2d(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.eps = 1e-5
        for name, value in (("weight", 1.5), ("bias", 0.1), ("running_mean", 0.2), ("running_var", 0.8)):
            self.register_buffer(name, torch.full((channels,), value))
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


@named("detectron2.modeling.backbone.resnet")
class BottleneckBlock(nn.Module):
    def __init__(self, channels, out, stride, norm=nn.BatchNorm2d, activation=None):
        super().__init__()
        self.shortcut = None if channels == out else Conv(channels, out, 1, stride, norm=norm(out))
        self.conv1 = Conv(channels, WIDTH, 1, norm=norm(WIDTH), activation=activation)
        self.conv2 = Conv(WIDTH, WIDTH, 3, stride, 1, norm=norm(WIDTH))
        self.conv3 = Conv(WIDTH, out, 1, norm=norm(out))

    def forward(self, x):
        out = self.conv3(F.relu_(self.conv2(F.relu_(self.conv1(x)))))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


@named("transformers.models.regnet.modeling_regnet", "RegNetConvLayer")
class Layer(nn.Module):
    def __init__(self, channels, out, kernel, stride=1, groups=1, activation=True):
        super().__init__()
        self.convolution = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.normalization = nn.BatchNorm2d(out)
        self.activation = nn.ReLU() if activation else nn.Identity()

    def forward(self, x):
        return self.activation(self.normalization(self.convolution(x)))


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.attention = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.attention(F.adaptive_avg_pool2d(x, 1))


@named("transformers.models.regnet.modeling_regnet", "RegNetShortCut")
class Shortcut(nn.Module):
    def __init__(self, channels, out, stride):
        super().__init__()
        self.convolution = nn.Conv2d(channels, out, 1, stride, bias=False)
        self.normalization = nn.BatchNorm2d(out)

    def forward(self, x):
        return self.normalization(self.convolution(x))


@named("transformers.models.regnet.modeling_regnet")
class RegNetYLayer(nn.Module):
    def __init__(self, channels, out, stride):
        super().__init__()
        self.shortcut = nn.Identity() if channels == out else Shortcut(channels, out, stride)
        self.layer = nn.Sequential(
            Layer(channels, out, 1), Layer(out, out, 3, stride, 2), Attention(out), Layer(out, out, 1, activation=False)
        )  # fmt: skip
        self.activation = nn.ReLU()

    def forward(self, x):
        return self.activation(self.layer(x) + self.shortcut(x))


def network(block, channels=12, **options):
    torch.manual_seed(0)
    return nn.Sequential(
        block(3, channels, 2, **options), block(channels, channels, 1, **options), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )  # fmt: skip


def forms(model):
    return [form for _, _, form in resfuse.report(resfuse.fuse(copy.deepcopy(model))).fused]


@pytest.mark.parametrize("model, form", [
    (network(BottleneckBlock), "3 convolutions"),
    (network(BottleneckBlock, norm=FrozenBatchNorm2d), "3 convolutions"),
    (network(BottleneckBlock, activation=nn.Identity()), "3 convolutions"),
    (network(RegNetYLayer), "2 convolutions + 1 convolution; called: Attention"),
], ids=["detectron2", "detectron2, frozen", "detectron2, identity", "transformers"])  # fmt: skip
def test_stand_ins_agree_with_themselves(model, form):
    assert forms(model) == [form] * 2
    found = agreement(model, (2, 3, 9, 8))
    assert max(found.evaluation, found.trained) < 1e-9 and not found.fallbacks


def test_a_function_for_an_activation_is_not_fused():
    model = network(BottleneckBlock, activation=F.relu)
    with pytest.warns(UserWarning, match="fused nothing"):
        fused = resfuse.fuse(copy.deepcopy(model))
    assert "conv1.activation is a function, no module" in str(resfuse.report(fused))


def test_another_convolution_that_calls_its_norm_is_not_fused():
    class Mine(Conv):
        pass

    model = network(BottleneckBlock)
    model[1].conv1.__class__ = Mine
    report = resfuse.report(resfuse.fuse(model))
    assert [name for name, *_ in report.fused] == ["0"] and "conv1 is a Mine" in str(report)


class Pooled(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).pooler_output.flatten(1)


@pytest.mark.parametrize("kind, layer", [
    ("ResNet", "bottleneck"), ("ResNet", "basic"), ("RegNet", "x"), ("RegNet", "y"),
])  # fmt: skip
def test_hugging_face(kind, layer):
    transformers = pytest.importorskip("transformers")
    sizes = {"embedding_size": WIDTH, "hidden_sizes": [16, 32], "depths": [1, 2], "layer_type": layer}
    sizes |= {"groups_width": WIDTH} if kind == "RegNet" else {}
    torch.manual_seed(0)
    model = Pooled(getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes)))
    found = agreement(model, (2, 3, 32, 32))
    assert len(forms(model)) == 4 and max(found.evaluation, found.trained) < 1e-9 and not found.fallbacks


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
@pytest.mark.parametrize("name, options", [("BottleneckBlock", {"bottleneck_channels": WIDTH}), ("BasicBlock", {})])
def test_detectron2(name, options, norm):
    resnet = pytest.importorskip("detectron2.modeling.backbone.resnet")
    torch.manual_seed(0)
    stage = resnet.ResNet.make_stage(
        getattr(resnet, name), 2, in_channels=3, out_channels=16, norm=norm, stride_per_block=[2, 1], **options
    )
    model = nn.Sequential(*stage, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = agreement(model, (2, 3, 17, 16))
    assert len(forms(model)) == 2 and max(found.evaluation, found.trained) < 1e-9 and not found.fallbacks
