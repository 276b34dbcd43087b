"""Blocks of timm and torchvision that are described by their parts, and rows of convolutions in nn.Sequential."""

import copy
import types
from collections import OrderedDict
from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import efficientnet as mbconv
from torchvision.models import mnasnet, mobilenetv2, mobilenetv3
from torchvision.models.googlenet import BasicConv2d as googlenet_unit
from torchvision.models.inception import BasicConv2d as inception_unit
from torchvision.models.quantization.googlenet import QuantizableBasicConv2d as quantizable_googlenet
from torchvision.models.quantization.inception import QuantizableBasicConv2d as quantizable_inception
from torchvision.models.quantization.resnet import QuantizableBasicBlock, QuantizableBottleneck
from torchvision.models.regnet import ResBottleneckBlock, SimpleStemIN
from torchvision.models.segmentation.deeplabv3 import ASPPConv, DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops.misc import Conv2dNormActivation

import resfuse
from resfuse import functional
from resfuse.arguments import ArgumentError
from resfuse.blocks import _segments, preactivated
from resfuse.blocks.described import BLOCKS
from resfuse.blocks.mixin import FusedMixin, original_name
from resfuse.kernels import measured

timm = pytest.importorskip("timm")
from timm import layers  # noqa: E402
from timm.models import _efficientnet_blocks as efficientnet  # noqa: E402
from timm.models import (  # noqa: E402
    byobnet,
    cspnet,
    densenet,
    dla,
    dpn,
    efficientformer,
    efficientformer_v2,
    efficientvit_mit,
    efficientvit_msra,
    hgnet,
    levit,
    nasnet,
    nextvit,
    pnasnet,
    regnet,
    repvit,
    res2net,
    resnest,
    resnet,
    resnetv2,
    senet,
    shvit,
    sknet,
    starnet,
    tiny_vit,
    tresnet,
    xception_aligned,
)  # fmt: skip

C = 16


def down(channels, stride, average=False):
    return (resnet.downsample_avg if average else resnet.downsample_conv)(C, channels, 1, stride)


def v2_block(cls, out_channels=C, **options):
    return cls(C, out_channels, conv_layer=layers.create_conv2d, norm_layer=layers.BatchNormAct2d, **options)


BUILDERS = {
    "basic": lambda: resnet.BasicBlock(C, C),
    "basic strided": lambda: resnet.BasicBlock(C, 8, 2, down(8, 2), drop_path=layers.DropPath(0.5)),
    "basic blurred": lambda: resnet.BasicBlock(C, 8, 2, down(8, 2), aa_layer=layers.BlurPool2d),
    "bottleneck": lambda: resnet.Bottleneck(C, 4, drop_path=layers.DropPath(0.5)),
    "bottleneck d": lambda: resnet.Bottleneck(C, 4, 2, down(16, 2, average=True)),
    "bottleneck with attention": lambda: resnet.Bottleneck(
        C, 4, 2, down(16, 2), attn_layer=layers.SEModule, drop_path=layers.DropPath(0.5)
    ),
    "bottleneck blurred": lambda: resnet.Bottleneck(C, 4, 2, down(16, 2, average=True), aa_layer=layers.BlurPool2d),
    "bottleneck with blocks left out": lambda: resnet.Bottleneck(
        C, 4, drop_block=lambda: layers.DropBlock2d(0.3, 3)
    ),
    "regnet": lambda: regnet.Bottleneck(C, 24, 2, group_size=8, se_ratio=0, drop_path_rate=0.5),
    "regnet with attention": lambda: regnet.Bottleneck(C, C, group_size=8),
    "regnet without shortcut": lambda: regnet.Bottleneck(C, 24, downsample=None, se_ratio=0),
    "edge": lambda: efficientnet.EdgeResidual(C, C, exp_ratio=2, drop_path_rate=0.5),
    "edge, strided, same": lambda: efficientnet.EdgeResidual(C, 24, 3, 2, exp_ratio=2, pad_type="same"),
    "edge with attention": lambda: efficientnet.EdgeResidual(C, C, exp_ratio=2, se_layer=efficientnet.SqueezeExcite),
    "inverted": lambda: efficientnet.InvertedResidual(C, C, exp_ratio=2, act_layer=nn.SiLU, drop_path_rate=0.5),
    "inverted, strided, with attention": lambda: efficientnet.InvertedResidual(
        C, 24, 5, 2, exp_ratio=2, act_layer=nn.Hardswish, se_layer=efficientnet.SqueezeExcite, pad_type="same"
    ),
    "inverted, leaky": lambda: efficientnet.InvertedResidual(C, C, exp_ratio=2, act_layer=nn.LeakyReLU),
    "separable": lambda: efficientnet.DepthwiseSeparableConv(C, C, act_layer=nn.SiLU),
    "separable with attention": lambda: efficientnet.DepthwiseSeparableConv(
        C, 24, se_layer=efficientnet.SqueezeExcite, pw_act=True, act_layer=nn.ReLU6
    ),
    "universal": lambda: efficientnet.UniversalInvertedResidual(C, C, 5, 3, exp_ratio=2, drop_path_rate=0.5),
    "universal, strided": lambda: efficientnet.UniversalInvertedResidual(
        C, 24, 0, 5, 3, stride=2, exp_ratio=2, layer_scale_init_value=None
    ),
    "mobilenetv2": lambda: mobilenetv2.InvertedResidual(C, C, 1, 2),
    "mobilenetv2, strided": lambda: mobilenetv2.InvertedResidual(C, 8, 2, 1),
    "mobilenetv3": lambda: mobilenetv3.InvertedResidual(
        mobilenetv3.InvertedResidualConfig(C, 5, 32, C, True, "HS", 1, 1, 1), nn.BatchNorm2d
    ),
    "mbconv": lambda: mbconv.MBConv(mbconv.MBConvConfig(2, 3, 1, C, C, 1, 1, 1), 0.5, nn.BatchNorm2d),
    "fused mbconv": lambda: mbconv.FusedMBConv(mbconv.FusedMBConvConfig(2, 3, 1, C, C, 1), 0.5, nn.BatchNorm2d),
    "mnasnet": lambda: mnasnet._InvertedResidual(C, C, 3, 1, 2),
    "wrapper": lambda: Conv2dNormActivation(C, 8, activation_layer=nn.SiLU),
    "torchvision regnet, stem": lambda: SimpleStemIN(C, 8, nn.BatchNorm2d, nn.ReLU),
    "torchvision regnet": lambda: ResBottleneckBlock(C, 24, 2, nn.BatchNorm2d, nn.ReLU, 8, 1.0, None),
    "torchvision regnet with attention": lambda: ResBottleneckBlock(C, C, 1, nn.BatchNorm2d, nn.ReLU, 8, 1.0, 0.25),
    "unit": lambda: layers.ConvNormAct(C, 8, 3, stride=2),
    "unit, blurred": lambda: layers.ConvNormAct(C, 8, 3, stride=2, aa_layer=layers.BlurPool2d, act_layer=nn.SiLU),
    "unit without activation": lambda: layers.ConvNormAct(C, 8, 1, apply_act=False),
    "unit with gelu": lambda: layers.ConvNormAct(C, 8, 3, act_layer=nn.GELU),
    "unit with skip": lambda: efficientnet.ConvBnAct(C, C, 3, skip=True, drop_path_rate=0.5),
    "levit": lambda: levit.ConvNorm(C, 8, 3, 2, 1),
    "efficientformer": lambda: efficientformer_v2.ConvNorm(C, 8),
    "efficientvit": lambda: efficientvit_msra.ConvNorm(C, 8),
    "tiny vit": lambda: tiny_vit.ConvNorm(C, 8),
    "repvit": lambda: repvit.ConvNorm(C, 8),
    "shvit": lambda: shvit.Conv2dNorm(C, 8),
    "hgnet": lambda: hgnet.ConvBNAct(C, 8, 3, use_lab=True),
    "googlenet": lambda: googlenet_unit(C, 8, kernel_size=3),
    "inception": lambda: inception_unit(C, 8, kernel_size=1),
    "quantizable googlenet": lambda: quantizable_googlenet(C, 8, kernel_size=3),
    "quantizable inception": lambda: quantizable_inception(C, 8, kernel_size=1),
    "quantizable basic": lambda: QuantizableBasicBlock(C, 24, 2, down(24, 2)),
    "quantizable bottleneck": lambda: QuantizableBottleneck(C, 4),
    "segmentation, dilated": lambda: ASPPConv(C, 8, 2),
    "segmentation, FCN": lambda: FCNHead(C, 5),
    "segmentation, DeepLab": lambda: DeepLabHead(C, 5, (2, 4)),
    "efficientformer down": lambda: efficientformer.Downsample(C, 8),
    "efficientformer stem": lambda: efficientformer.Stem4(C, 8),
    "efficientformer mlp": lambda: efficientformer.ConvMlpWithNorm(C, 8, drop=0.3),
    "efficientvit of MIT": lambda: efficientvit_mit.ConvNormAct(C, 8, dropout=0.3),
    "starnet": lambda: starnet.ConvBN(C, 8),
    "nextvit": lambda: nextvit.ConvNormAct(C, 8, 3, 2),
    "nextvit convolution in attention": lambda: nextvit.ConvAttention(C, 8),
    "nextvit patches": lambda: nextvit.PatchEmbed(C, 8, 2),
    "nasnet": lambda: nasnet.ActConvBn(C, 8, 1),
    "pnasnet": lambda: pnasnet.ActConvBn(C, 8, 1),
    "pointwise after depthwise": lambda: layers.SeparableConvNormAct(C, 8, 3, 2, padding=1),
    "pointwise after depthwise, linear": lambda: layers.SeparableConvNormAct(C, C, 3, padding=1, apply_act=False),
    "split attention": lambda: layers.SplitAttn(C, 8, norm_layer=nn.BatchNorm2d),
    "split attention of one": lambda: layers.SplitAttn(C, 8, radix=1, groups=2, norm_layer=nn.BatchNorm2d),
    "split attention, dropped": lambda: layers.SplitAttn(
        C, 8, 3, 2, radix=4, norm_layer=nn.BatchNorm2d, drop_layer=partial(nn.Dropout, 0.3), act_layer=nn.SiLU
    ),
    "byob basic": lambda: byobnet.BasicBlock(C, C, drop_path_rate=0.5),
    "byob bottleneck": lambda: byobnet.BottleneckBlock(
        C, 24, stride=2, bottle_ratio=0.5, group_size=4, downsample="conv1x1", extra_conv=True
    ),
    "byob bottleneck with attention": lambda: byobnet.BottleneckBlock(
        C, C, attn_last=True, layers=byobnet.LayerFn(attn=layers.SEModule, act=nn.SiLU)
    ),
    "byob dark": lambda: byobnet.DarkBlock(C, 24, stride=2),
    "byob edge": lambda: byobnet.EdgeBlock(C, C, linear_out=True),
    "csp bottleneck": lambda: cspnet.BottleneckBlock(C, C, drop_path=0.5),
    "csp dark": lambda: cspnet.DarkBlock(C, C, act_layer=nn.SiLU, drop_path=0.5),
    "csp edge with attention": lambda: cspnet.EdgeBlock(C, C, attn_layer=layers.SEModule),
    "senet with attention": lambda: senet.SEResNeXtBottleneck(C, 4, 2, 4, base_width=64),
    "senet bottleneck with attention": lambda: senet.SEResNetBottleneck(C, 4, 1, 4),
    "senet strided with attention": lambda: senet.SEBottleneck(C, 4, 2, 4, 2, nn.Sequential(
        nn.Conv2d(C, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
    )),
    "senet basic with attention": lambda: senet.SEResNetBlock(C, C, 1, 4),
    "tresnet": lambda: tresnet.BasicBlock(C, C, use_se=False, drop_path_rate=0.5),
    "tresnet with attention": lambda: tresnet.Bottleneck(C, 4, use_se=True),
    "resnest with attention": lambda: resnest.ResNestBottleneck(C, 4, 2, down(16, 2), avd=True),
    "selective kernels with attention": lambda: sknet.SelectiveKernelBottleneck(
        C, 8, 2, layers.ConvNormAct(C, 32, 1, 2, apply_act=False)
    ),
    "xception": lambda: xception_aligned.SeparableConv2d(C, 24, 3, 2),
    "bottleneck with elu": lambda: resnet.Bottleneck(C, 4, act_layer=nn.ELU),
    "regnet with mish and attention": lambda: regnet.Bottleneck(C, C, group_size=8, act_layer=layers.Mish),
    "edge with gelu": lambda: efficientnet.EdgeResidual(C, C, act_layer=nn.GELU),
    "lone": lambda: nn.Sequential(nn.Conv2d(C, 4, 1), nn.BatchNorm2d(4), nn.ReLU()),
    "lone with mish": lambda: nn.Sequential(nn.Conv2d(C, 4, 1), nn.BatchNorm2d(4), nn.Mish(inplace=True)),
    "dense layer": lambda: densenet.DenseLayer(C, 8, 2, drop_rate=0.3),
    "dense transition": lambda: densenet.DenseTransition(C, 8),
    "dense transition, blurred": lambda: densenet.DenseTransition(C, 8, aa_layer=layers.BlurPool2d),
    "dual path": lambda: dpn.BnActConv2d(C, 8, 3, 2),
    "v2 basic": lambda: v2_block(resnetv2.PreActBasic, drop_path_rate=0.5),
    "v2 basic, strided": lambda: v2_block(resnetv2.PreActBasic, 24, stride=2, proj_layer=resnetv2.DownsampleConv),
    "v2 bottleneck": lambda: v2_block(resnetv2.PreActBottleneck, drop_path_rate=0.5),
    "v2 bottleneck, averaged": lambda: v2_block(
        resnetv2.PreActBottleneck, 24, stride=2, proj_layer=resnetv2.DownsampleAvg
    ),
    "res2net": lambda: res2net.Bottle2neck(C, 4, norm_layer=nn.BatchNorm2d, base_width=64, scale=4),
    "res2net, strided": lambda: res2net.Bottle2neck(
        C, 4, 2, down(16, 2), norm_layer=nn.BatchNorm2d, base_width=64, scale=3
    ),
    "res2net with attention": lambda: res2net.Bottle2neck(
        C, 4, norm_layer=nn.BatchNorm2d, base_width=64, attn_layer=layers.SEModule
    ),
    "res2net in dla": lambda: dla.DlaBottle2neck(C, C, cardinality=2, base_width=32),
    "dla basic": lambda: dla.DlaBasic(C, C),
    "dla bottleneck": lambda: dla.DlaBottleneck(C, C),
    "dla tree": lambda: dla.DlaTree(2, dla.DlaBasic, C, 24, level_root=True, root_shortcut=True),
    "resnet": lambda: resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), 8, C, channels=(8, 8, 8, 8)),
    "resnet, deep stem": lambda: resnet.ResNet(
        resnet.BasicBlock, (1, 1, 1, 1), 8, C, channels=(8, 8, 8, 8), stem_type="deep", stem_width=4
    ),
    "resnet, replaced pool": lambda: resnet.ResNet(
        resnet.BasicBlock, (1, 1, 1, 1), 8, C, channels=(8, 8, 8, 8), replace_stem_pool=True
    ),
    "resnet, deep stem, replaced pool": lambda: resnet.ResNet(
        resnet.BasicBlock, (1, 1, 1, 1), 8, C, channels=(8, 8, 8, 8), stem_type="deep", stem_width=4,
        replace_stem_pool=True,
    ),
    "efficientnet with attention": lambda: timm.create_model("test_efficientnet", in_chans=C, num_classes=8),
    "row": lambda: nn.Sequential(
        nn.Conv2d(C, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.Flatten(),
    ),
    "row and others": lambda: nn.Sequential(
        nn.Conv2d(C, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8),
        nn.Conv2d(8, 4, 3), nn.GELU(),
    ),
}  # fmt: skip
ALL = pytest.mark.parametrize("name", BUILDERS)


def twins(name):
    torch.manual_seed(0)
    eager = BUILDERS[name]().double()
    for module in eager.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.normal_(module.bias, 0, 0.5)
            nn.init.normal_(module.running_mean, 0, 0.2), nn.init.uniform_(module.running_var, 0.5, 1.5)
    return eager, resfuse.fuse(copy.deepcopy(eager))


def step(block, x):
    torch.manual_seed(1)  # for what is drawn
    x = x.clone().requires_grad_()
    out = block(x)
    out.sin().sum().backward()
    found = {"out": out.detach(), "dx": x.grad, **{f"d{n}": p.grad for n, p in block.named_parameters()}}
    return found | {n: b.clone() for n, b in block.named_buffers()}


@ALL
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_described_block_is_its_eager_twin(name, training):
    eager, fused = twins(name)
    assert any(isinstance(m, FusedMixin) for m in fused.modules())
    assert isinstance(fused, FusedMixin) or original_name(eager) not in BLOCKS, "fused as a whole"
    x = torch.randn(3, C, 9, 8, dtype=torch.float64)
    expected, found = (step(block.train(training), x) for block in (eager, fused))
    assert not any(m.resfuse_state.fallbacks for m in fused.modules() if isinstance(m, FusedMixin))
    assert found.keys() == expected.keys()
    for key, theirs in expected.items():
        assert (theirs is None) == (found[key] is None), key
        if theirs is not None:
            torch.testing.assert_close(found[key], theirs, rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", ["inverted, leaky", "separable with attention", "mobilenetv2", "wrapper", "row"])
def test_it_goes_into_a_graph(name):
    _, fused = twins(name)
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, C, 9, 8, dtype=torch.float64)
    expected, found = step(fused, x), step(compiled, x)
    for key, theirs in expected.items():
        key = key if key in found else key.replace("d", "d_orig_mod.", 1) if key[0] == "d" else f"_orig_mod.{key}"
        torch.testing.assert_close(found[key], theirs, rtol=1e-9, atol=1e-9)


@ALL
def test_it_comes_back(name):
    eager, fused = twins(name)
    assert list(fused.state_dict()) == list(eager.state_dict())
    assert copy.deepcopy(fused).state_dict().keys() == eager.state_dict().keys()
    assert [type(m) for m in resfuse.unfuse(fused).modules()] == [type(m) for m in eager.modules()]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", [n for n in BUILDERS if "attention" not in n and "left out" not in n])
def test_hooks_inside_fire(name):
    """On whatever module: it is called, or the block runs its original forward."""
    eager, fused = twins(name)
    x = torch.randn(2, C, 9, 8, dtype=torch.float64)
    inner = [n for n, m in eager.named_modules() if n]
    for which in inner:
        calls = []
        for block in (eager, fused):
            fired = []
            handle = block.get_submodule(which).register_forward_hook(lambda *_, fired=fired: fired.append(1))
            torch.manual_seed(1)
            block.eval()(x)
            handle.remove()
            calls.append(len(fired))
        assert calls[0] == calls[1], which


def test_every_description_has_a_block_here():
    """Of libraries that are installed with the tests; test_other_libraries.py has the others'."""
    built = {f"{type(b).__module__}.{type(b).__qualname__}" for b in (builder() for builder in BUILDERS.values())}
    described = {name for name in BLOCKS if name.startswith(("timm", "torchvision"))}
    assert {*described, *(name for name in preactivated.ORIGINALS if name.startswith("timm"))} <= built


def test_the_last_convolution_of_a_deep_stem_counts_as_a_plain_one_does():
    """Both are called, before a BatchNorm, ReLU and pool in one."""
    for name in ("resnet", "resnet, deep stem"):
        assert resfuse.explain(BUILDERS[name](), input_size=(1, C, 64, 64)).coverage == 1


def test_an_observed_sum_is_left_to_its_module():
    """As a quantization that is being prepared has it."""
    block, x = resfuse.fuse(QuantizableBottleneck(C, 4)).eval(), torch.randn(2, C, 5, 5)
    expected, seen = block(x), []
    assert not block.resfuse_state.fallbacks
    block.skip_add_relu.activation_post_process = observer = nn.Identity()
    observer.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(block(x), expected)
    assert list(block.resfuse_state.fallbacks) == ["children"] and seen == [1]


def test_a_dropped_path_draws_what_timm_draws():
    eager, fused = twins("bottleneck")
    x = torch.randn(64, C, 4, 4, dtype=torch.float64)
    a, b = step(eager, x), step(fused, x)
    dropped = (a["out"] == torch.relu(x)).flatten(1).all(1)
    assert 10 < dropped.sum() < 54
    assert torch.equal(dropped, (b["out"] == torch.relu(x)).flatten(1).all(1))


def test_other_activations_are_called_as_modules():
    ((_, _, forms),) = resfuse.explain(resnet.Bottleneck(C, 4, act_layer=nn.ELU)).fused
    assert forms == "1 convolution + 1 convolution + 1 convolution; called: ELU"


def test_unproven_activations_are_left_to_the_modules_on_a_gpu(monkeypatch):
    on_gpu = types.SimpleNamespace(is_cuda=True)
    row = nn.Sequential(nn.Conv2d(C, 4, 1), nn.BatchNorm2d(4), nn.SiLU())
    steps = [_segments.step(*row)]
    monkeypatch.setattr(measured, "UNPROVEN", {"triton": ("bn_act",), "cuda": ("bn_act",)})
    assert "SiLU have passed" in _segments.unproven(steps, on_gpu, "auto")
    assert _segments.unproven(steps, on_gpu, "triton") is None
    assert _segments.unproven(steps, torch.zeros(()), "auto") is None
    assert _segments.unproven([_segments.step(*row[:2], nn.ReLU())], on_gpu, "auto") is None
    monkeypatch.setattr(measured, "UNPROVEN", {"cuda": ("bn_act",)})
    assert _segments.unproven(steps, on_gpu, "auto") is None, "one set's have"
    monkeypatch.setattr(_segments, "unproven", lambda *_: "none has")
    eager, fused = copy.deepcopy(row), resfuse.fuse(row)
    x = torch.randn(2, C, 5, 5)
    assert torch.equal(fused(x), eager(x)) and fused.resfuse_state.fallbacks == {"unproven": (1, "none has")}


def test_synchronised_statistics_are_left_to_the_original_forward():
    block = nn.SyncBatchNorm.convert_sync_batchnorm(resfuse.fuse(resnet.Bottleneck(C, 4, 2, down(16, 2))))
    block(torch.randn(2, C, 9, 8))
    assert set(block.resfuse_state.fallbacks) == {"sync_order"}


def test_sequentials_without_a_row_stay_as_they_are():
    plain = nn.Sequential(OrderedDict(a=nn.Conv2d(3, 4, 1), b=nn.ReLU()))
    with pytest.warns(UserWarning, match="fused nothing"):
        assert type(resfuse.fuse(plain)) is nn.Sequential
    model = resfuse.fuse(torchvision.models.resnet18())
    assert type(model.layer1) is nn.Sequential and type(model.layer2[0].downsample) is nn.Sequential


class Layer(nn.Module):
    """As Hugging Face's ResNets name things."""

    def __init__(self, in_channels, out_channels, kernel, stride=1, activation=True):
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        self.normalization = nn.BatchNorm2d(out_channels)
        self.activation = nn.ReLU() if activation else nn.Identity()

    def forward(self, x):
        return self.activation(self.normalization(self.convolution(x)))


class Shortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(C, 24, 1, 2, bias=False)
        self.normalization = nn.BatchNorm2d(24)

    def forward(self, x):
        return self.normalization(self.convolution(x))


class OwnBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(Layer(C, 8, 1), Layer(8, 8, 3, 2), Layer(8, 24, 1, activation=False))
        self.shortcut, self.activation = Shortcut(), nn.ReLU()

    def forward(self, x):
        return self.activation(self.layer(x) + self.shortcut(x))


OWN = resfuse.BlockDescription(
    tuple(
        resfuse.Part(f"layer.{i}.convolution", f"layer.{i}.normalization", (f"layer.{i}.activation",)) for i in range(3)
    ),
    shortcut="shortcut", activation="activation",
)  # fmt: skip


@pytest.fixture
def tables(monkeypatch):
    """As they are without what a test registers."""
    from resfuse.blocks import described, plans

    monkeypatch.setattr(plans, "PLANS", dict(plans.PLANS))
    monkeypatch.setattr(described, "BLOCKS", dict(described.BLOCKS))


def test_a_block_of_ones_own(tables):
    torch.manual_seed(0)
    eager = OwnBlock().double()
    resfuse.register_block(OwnBlock, OWN)
    resfuse.register_block(OwnBlock, OWN)  # again is the same
    fused = resfuse.fuse(copy.deepcopy(eager))
    x = torch.randn(2, C, 9, 8, dtype=torch.float64)
    expected, found = step(eager, x), step(fused, x)
    assert type(fused).__name__ == "OwnBlock" and isinstance(fused, FusedMixin) and not fused.resfuse_state.fallbacks
    assert resfuse.report(fused).fused == [("", "OwnBlock", "3 convolutions")]
    for key, theirs in expected.items():
        torch.testing.assert_close(found[key], theirs, rtol=1e-9, atol=1e-9)


INVERTED = resfuse.BlockDescription(
    (resfuse.Part("conv_s2d", "bn_s2d"), resfuse.Part("conv_pw", "bn1"), resfuse.Part("conv_dw", "bn2", ("aa", "se")),
     resfuse.Part("conv_pwl", "bn3")),
    drop_path="drop_path", skips="has_skip",
)  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"stride": 2, "pad_type": "same"}, {"se_layer": efficientnet.SqueezeExcite}])
def test_an_inverted_residual_for_who_wants_it(options, tables):
    resfuse.register_block("timm.models._efficientnet_blocks.InvertedResidual", INVERTED)
    torch.manual_seed(0)
    eager = efficientnet.InvertedResidual(C, C, exp_ratio=2, drop_path_rate=0.5, **options).double()
    fused = resfuse.fuse(copy.deepcopy(eager))
    x = torch.randn(3, C, 9, 8, dtype=torch.float64)
    expected, found = step(eager, x), step(fused, x)
    assert not fused.resfuse_state.fallbacks
    for key, theirs in expected.items():
        torch.testing.assert_close(found[key], theirs, rtol=1e-9, atol=1e-9)


def test_what_cannot_be_registered(tables):
    with pytest.raises(ValueError, match="torchvision.models.resnet.Bottleneck has a fused form already"):
        resfuse.register_block("torchvision.models.resnet.Bottleneck", OWN)
    resfuse.register_block(OwnBlock, OWN)
    with pytest.raises(ValueError, match="OwnBlock has a fused form already"):
        resfuse.register_block(OwnBlock, OWN._replace(activation=None))
    nothing = OWN._replace(parts=())
    for block, description in ((OwnBlock(), OWN), (int, OWN), (OwnBlock, "3 convolutions"), (Layer, nothing)):
        with pytest.raises(TypeError):
            resfuse.register_block(block, description)


def changed(name, change):
    """A fused block that was changed before, or after, and its eager twin."""
    torch.manual_seed(0)
    eager = BUILDERS[name]().double()
    before, after = copy.deepcopy(eager), resfuse.fuse(copy.deepcopy(eager))
    for block in (eager, before, after):
        change(block)
    return eager, resfuse.fuse(before), after


class Rectified(nn.Sequential):
    def forward(self, x):
        return torch.relu(super().forward(x))


def another_convolution(block):
    torch.manual_seed(1)
    conv = block.conv2.conv
    block.conv2 = nn.Sequential(nn.Conv2d(conv.in_channels, conv.out_channels, 3, conv.stride, 1)).to(conv.weight.dtype)


def another_forward(block):
    block.conv2.__class__ = type("Mine", (type(block.conv2),), {"forward": lambda self, x: self.bn(self.conv(x))})


def another_child(block):
    block.conv2.more = nn.ReLU()


def another_shortcut(block):
    block.downsample = Rectified(*block.downsample)


@pytest.mark.parametrize("name, change", [
    ("regnet", another_convolution), ("regnet", another_forward), ("regnet", another_child),
    ("basic strided", another_shortcut),
], ids=lambda value: getattr(value, "__name__", value))  # fmt: skip
def test_what_is_in_the_place_of_what_is_described_is_not_passed_over(name, change):
    twins = changed(name, change)
    x = torch.randn(3, C, 9, 8, dtype=torch.float64)
    expected, *found = (step(block, x) for block in twins)
    for each in found:
        for key, theirs in expected.items():
            torch.testing.assert_close(each[key], theirs, rtol=1e-9, atol=1e-9)


def test_a_subclass_made_later_runs_as_the_block_does():
    """As FSDP makes of what it shards."""
    net = resfuse.fuse(timm.create_model("resnet18"))
    x = torch.randn(2, 3, 32, 32)
    expected = net.eval()(x)
    for module in (net, net.layer1[0]):
        module.__class__ = type(f"Sharded{type(module).__name__}", (type(module),), {})
    assert torch.equal(net(x), expected)
    assert resfuse.report(net).fallbacks == [] and len(resfuse.report(net).fused) > 8


@pytest.mark.parametrize("name, call, of", [
    ("regnet with attention", "conv_bn_add_relu", 1), ("inverted, strided, with attention", "conv_bn_relu", 2),
    ("bottleneck d", "conv_bn_add_relu", 1), ("bottleneck blurred", "conv_bn_add_relu", 1),
    ("res2net", "conv_bn_relu", 3), ("res2net", "conv_bn_add_relu", 1), ("resnet", "bn_relu", 1),
    ("unit, blurred", "conv_bn_relu", 1),
])  # fmt: skip
def test_a_call_that_does_not_fit_is_done_by_its_modules_alone(name, call, of, monkeypatch):
    """After others have updated their statistics, which the original forward would update again."""
    eager, fused = twins(name)
    x = torch.randn(3, C, 9, 8, dtype=torch.float64)
    expected, calls, function = step(eager, x), [], getattr(functional, call)

    def refused(*args, **kwargs):
        calls.append(1)
        if len(calls) == of:
            raise ArgumentError("x must be something else")
        return function(*args, **kwargs)

    monkeypatch.setattr(functional, call, refused)
    found = step(fused, x)
    assert len(calls) >= of
    assert [code for _, code, _, count in resfuse.report(fused).fallbacks] == ["argument"]
    for key, theirs in expected.items():
        torch.testing.assert_close(found[key], theirs, rtol=1e-9, atol=1e-9)
