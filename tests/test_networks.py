"""Whole networks and the modules of `resfuse.blocks`: eager's results, gradients and buffers, in every way they run."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torchvision.models import densenet
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d

import resfuse
from resfuse import blocks
from resfuse.blocks import modules
from resfuse.blocks.mixin import FusedMixin
from resfuse.kernels import dispatch


def resnet(block=BasicBlock, **settings):
    torch.manual_seed(0)
    return ResNet(block, [2, 1, 1, 1], num_classes=10, **settings)


def small_densenet(**settings):
    torch.manual_seed(0)
    return densenet.DenseNet(8, (2, 3), 16, num_classes=10, **settings)


NETWORKS = {"basic": resnet, "bottleneck": lambda: resnet(Bottleneck), "densenet": small_densenet}
OWN = {
    "ConvBNReLU": lambda: (modules.ConvBNReLU(6, 9, 3, stride=2), 6),
    "ConvBNReLU wide": lambda: (modules.ConvBNReLU(6, 24, 1, bias=True, relu=False), 6),
    "Chain": lambda: (modules.Chain(modules.ConvBNReLU(6, 4), modules.ConvBNReLU(4, 9, 1, relu=False)), 6),
    "BNReLU": lambda: (modules.BNReLU(6), 6),
    "Stem": lambda: (modules.Stem(3, 8), 3),
    "basic": lambda: (modules.ResidualBlock(8, 8), 8),
    "basic projection": lambda: (modules.ResidualBlock(8, 12, 2), 8),
    "basic pooled": lambda: (modules.ResidualBlock(8, 12, 2, shortcut="pooled"), 8),
    "basic padded": lambda: (modules.ResidualBlock(8, 13, 2, shortcut="padded"), 8),
    "plain": lambda: (modules.ResidualBlock(8, 12, 2, shortcut="none"), 8),
    "bottleneck": lambda: (modules.ResidualBlock(16, 16, width=4, groups=2, scale=0.5), 16),
    "bottleneck drop path": lambda: (modules.ResidualBlock(16, 32, 2, width=4, drop_path=0.5), 16),
    "linear": lambda: (modules.ResidualBlock(8, 8, relu=False), 8),
    "highway": lambda: (modules.ResidualBlock(8, 8, gated=True), 8),
    "preact highway": lambda: (modules.ResidualBlock(8, 8, gated=True, preactivation=True), 8),
    "preact plain": lambda: (modules.ResidualBlock(8, 8, preactivation=True, shortcut="none"), 8),
    "preact padded": lambda: (modules.ResidualBlock(8, 12, 2, preactivation=True, shortcut="padded"), 8),
    "PreActBlock": lambda: (modules.PreActBlock(8, 12, 2, drop_path=0.3), 8),
    "PreActBlock pooled": lambda: (modules.PreActBlock(8, 12, 2, shortcut="pooled"), 8),
    "PreActBottleneck": lambda: (modules.PreActBottleneck(16, 4), 16),
}


def gradients(model, x, seed=7):
    """Output, gradients and buffers of two training steps and an eval pass."""
    torch.manual_seed(seed)
    model.train()
    for _ in range(2):
        model.zero_grad()
        x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        out = model(x)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    found = [out.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]
    model.eval()
    return [*found, model(x).detach()]


def agree(eager, x, tolerance=1e-8):
    fused = resfuse.fuse(copy.deepcopy(eager))
    for ours, theirs in zip(gradients(fused, x), gradients(eager, x), strict=True):
        assert (ours - theirs).double().norm() <= tolerance * (1 + theirs.double().norm())
    for module in fused.modules():
        assert not isinstance(module, FusedMixin) or not module.resfuse_state.fallbacks
    return fused


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_train_as_eager_in_float64(name, channels_last):
    x = torch.randn(3, 3, 48, 40, dtype=torch.float64)
    model = NETWORKS[name]().double()
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    agree(model, x, 1e-7)


@pytest.mark.parametrize("name", OWN)
def test_own_modules_agree_with_their_originals(name):
    torch.manual_seed(1)
    module, channels = OWN[name]()
    for p in module.parameters():
        nn.init.normal_(p, 0.3, 0.5)
    agree(module.double(), torch.randn(4, channels, 9, 8, dtype=torch.float64))


@pytest.mark.parametrize("name", ["ConvBNReLU", "BNReLU", "Stem", "ResidualBlock", "PreActBlock", "PreActBottleneck"])
def test_blocks_are_fused_from_the_start(name):
    made = {"ConvBNReLU": (3, 8), "BNReLU": (3,), "Stem": (3, 8), "PreActBottleneck": (16, 4)}.get(name, (3, 8))
    module = getattr(blocks, name)(*made)
    assert isinstance(module, getattr(modules, name)) and isinstance(module, FusedMixin)
    assert list(module.state_dict()) == list(getattr(modules, name)(*made).state_dict())
    x = torch.randn(2, made[0], 8, 8)
    assert torch.equal(pickle.loads(pickle.dumps(module)).eval()(x), module.eval()(x))
    assert resfuse.report(module, input_size=x.shape).fused[0][1] == name


@pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck", "ResNet", "DenseLayer", "Transition"])
def test_torchvisions_blocks_have_fused_classes(name):
    assert issubclass(getattr(blocks, name), FusedMixin)
    with pytest.raises(AttributeError, match="NoSuchBlock"):
        blocks.NoSuchBlock  # noqa: B018


def test_zero_init_residual_reaches_fused_blocks():
    model = ResNet(resfuse.BasicBlock, [1, 1, 1, 1], zero_init_residual=True)
    assert not model.layer1[0].bn2.weight.any()


def test_bad_shortcuts_are_named():
    with pytest.raises(ValueError, match="shortcut='skip' is not one of identity"):
        modules.ResidualBlock(8, 8, shortcut="skip")
    with pytest.raises(ValueError, match="an identity needs"):
        modules.ResidualBlock(8, 12, shortcut="identity")
    with pytest.raises(ValueError, match="gated needs"):
        modules.ResidualBlock(8, 12, gated=True)


def test_a_chain_takes_a_list_and_what_it_does_not_fuse_runs():
    chain = blocks.Chain(blocks.ConvBNReLU(7, 4), modules.ConvBNReLU(4, 5)).eval()
    parts = [torch.randn(2, c, 6, 6) for c in (3, 4)]
    out = chain(parts)
    assert not chain.resfuse_state.fallbacks and torch.allclose(out, chain(torch.cat(parts, 1)), atol=1e-6)
    chain[0].relu = False
    assert not torch.allclose(chain(parts), out) and list(chain.resfuse_state.fallbacks) == ["children"]
    with pytest.raises(TypeError, match="a Chain is of ConvBNReLU, got Conv2d"):
        blocks.Chain(nn.Conv2d(3, 3, 1))


# Stem ----------------------------------------------------------------------------------------------------------------

STEMS = {
    "no pool": lambda m: setattr(m, "maxpool", nn.Identity()),
    "other pool": lambda m: setattr(m, "maxpool", nn.MaxPool2d((2, 3), (1, 2), (0, 1), ceil_mode=True)),
    "hook on conv1": lambda m: m.conv1.register_forward_hook(lambda *_: None),
}
REFUSED_STEMS = {
    "average": (lambda m: setattr(m, "maxpool", nn.AvgPool2d(2)), "module_type"),
    "norm": (lambda m: setattr(m, "bn1", nn.GroupNorm(4, 64).double()), "module_type"),
    "own forward": (lambda m: setattr(m, "_forward_impl", lambda x: m.fc(m.conv1(x).mean((2, 3)).repeat(1, 8))),
                    "own_forward"),
    "hook on relu": (lambda m: m.relu.register_forward_hook(lambda *_: None), "inner_hook"),
    "hook on pool": (lambda m: m.maxpool.register_forward_hook(lambda *_: None), "inner_hook"),
}


@pytest.mark.parametrize("change", STEMS)
def test_stems_that_differ(change):
    model = resnet().double()
    STEMS[change](model)
    agree(model, torch.randn(2, 3, 32, 32, dtype=torch.float64), 1e-7)


@pytest.mark.parametrize("change", REFUSED_STEMS)
def test_stems_that_run_their_original(change):
    """Found by fuse, or, changed afterwards, at the call."""
    make, code = REFUSED_STEMS[change]
    model = resnet().double()
    make(model)
    fused = resfuse.fuse(copy.deepcopy(model))
    assert type(fused) is ResNet and [s[1] for s in resfuse.explain(model).skipped] == [code]
    later = resfuse.fuse(resnet().double())
    make(later)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model.eval()(x)
    assert torch.allclose(fused.eval()(x), expected) and torch.allclose(later.eval()(x), expected)
    assert list(later.resfuse_state.fallbacks) == [code]


def test_layers_taken_out_of_a_fused_network_stay_fused():
    model = resfuse.fuse(resnet(Bottleneck)).eval()
    x, seen = torch.randn(2, 3, 32, 32), {}
    model.layer2.register_forward_hook(lambda m, a, out: seen.update(out=out))
    model(x)
    getter = IntermediateLayerGetter(model, {"layer2": "out"})
    assert torch.allclose(getter(x)["out"], seen["out"], atol=1e-5)
    assert isinstance(getter["layer2"][0], FusedMixin)


@pytest.mark.parametrize("memory", ["balanced", "leanest"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_a_backbone_around_a_network_has_its_stem_fused(norm, memory):
    """As segmentation and detection have it: the layers' outputs by names of their own."""
    getter = IntermediateLayerGetter(resnet(Bottleneck, norm_layer=norm).double(), {"layer1": "low", "layer3": "out"})
    config = resfuse.FuseConfig(memory=memory)
    twin = resfuse.fuse(copy.deepcopy(getter), config=config, input_size=(2, 3, 32, 32))
    assert memory == "balanced" or twin.resfuse_state.memory == memory, "its stem's"
    assert resfuse.explain(getter).coverage == 1
    found = []
    for model in (getter, twin):
        torch.manual_seed(0)
        out = model(torch.randn(2, 3, 32, 32, dtype=torch.float64))
        assert list(out) == ["low", "out"]
        sum(t.sin().sum() for t in out.values()).backward()
        found.append([*out.values(), *(p.grad for p in model.parameters()), *model.buffers()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-8)
    assert not any(m.resfuse_state.fallbacks for m in twin.modules() if isinstance(m, FusedMixin))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    twin.return_layers["relu"] = "early"
    assert list(twin(x)) == ["early", "low", "out"]
    twin.return_layers = {"relu": "early", "layer1": "low"}
    assert list(twin(x)) == ["early", "low"]
    assert list(twin.resfuse_state.fallbacks) == ["argument", "returned"]


def hook(module):
    module.register_forward_hook(lambda *_: None)


OWN_REFUSED = {
    "shared norm": (lambda: modules.ResidualBlock(8, 8), lambda m: setattr(m, "bn2", m.bn1), "shared_norm"),
    "hook on norm": (lambda: modules.PreActBlock(8, 8), lambda m: hook(m.bn1), "inner_hook"),
    "padding mode": (lambda: modules.ConvBNReLU(8, 8), lambda m: setattr(m.conv, "padding_mode", "reflect"), "padding"),
    "chain, shared norm": (lambda: modules.Chain(modules.ConvBNReLU(8, 8), modules.ConvBNReLU(8, 8)),
                           lambda m: setattr(m[1], "bn", m[0].bn), "shared_norm"),
    "chain, hook on layer": (lambda: modules.Chain(modules.ConvBNReLU(8, 8)), lambda m: hook(m[0]), "inner_hook"),
    "dense, shared norm": (lambda: densenet._DenseLayer(8, 2, 4, 0.0), lambda m: setattr(m, "norm2", m.norm1),
                           "shared_norm"),
    "dense, hook on relu": (lambda: densenet._DenseLayer(8, 2, 4, 0.0), lambda m: hook(m.relu2), "inner_hook"),
    "dense, hook on relu1": (lambda: densenet._DenseLayer(8, 2, 4, 0.0), lambda m: hook(m.relu1), "inner_hook"),
    "dense, other conv": (lambda: densenet._DenseLayer(8, 2, 4, 0.0),
                          lambda m: setattr(m, "conv2", nn.ConvTranspose2d(8, 2, 1)), "module_type"),
    "transition, more": (lambda: densenet._Transition(8, 4), lambda m: m.append(nn.Identity()), "children"),
    "stem, indices": (lambda: modules.Stem(8, 8), lambda m: setattr(m.maxpool, "return_indices", True), "pool"),
    "norm of groups": (lambda: modules.BNReLU(8), lambda m: setattr(m, "bn", nn.GroupNorm(2, 8)), "module_type"),
}


@pytest.mark.parametrize("case", OWN_REFUSED)
def test_what_has_no_fused_form_runs_the_original(case):
    make, change, code = OWN_REFUSED[case]
    torch.manual_seed(0)
    module = make()
    change(module)
    assert [reason for _, reason, _ in resfuse.explain(module, input_size=(2, 8, 9, 9)).skipped] == [code]
    later = resfuse.fuse(make())
    change(later)
    later.load_state_dict(module.state_dict())
    x, found = torch.randn(2, 8, 16, 16), []
    for m in (later, module):
        out = m(x)
        found.append(out[0] if isinstance(out, tuple) else out)
    assert torch.equal(*found) and list(later.resfuse_state.fallbacks) == [code]


def test_a_gate_is_a_module_of_its_own():
    block, seen = blocks.ResidualBlock(8, 8, gated=True), []
    block.gate.register_forward_hook(lambda *_: seen.append(1))
    block(torch.randn(2, 8, 6, 6))
    assert seen and not block.resfuse_state.fallbacks and block.gate.bias.unique().tolist() == [-1.0]


def test_feature_extraction_by_name():
    model = resfuse.fuse(resnet(Bottleneck)).eval()
    x = torch.randn(2, 3, 32, 32)
    extracted = create_feature_extractor(model, ["layer1.0.relu_1", "layer2"])(x)
    plain = create_feature_extractor(resfuse.unfuse(copy.deepcopy(model)), ["layer1.0.relu_1", "layer2"])(x)
    assert all(torch.allclose(extracted[name], plain[name], atol=1e-5) for name in plain)


def test_a_filter_can_leave_the_stem_alone():
    model = resfuse.fuse(resnet(), filter_fn=lambda module, fqn: fqn != "")
    assert type(model) is ResNet and isinstance(model.layer1[0], FusedMixin)


# DenseNet ------------------------------------------------------------------------------------------------------------


def test_dense_layers_drop_what_eager_drops():
    agree(small_densenet(drop_rate=0.5).double(), torch.randn(3, 3, 32, 32, dtype=torch.float64), 1e-7)


def test_memory_efficient_dense_layers_update_their_statistics_once():
    """torchvision's checkpoint updates norm1 twice a step; fused layers keep as little and do as plain ones do."""
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    plain, efficient = small_densenet().double(), resfuse.fuse(small_densenet(memory_efficient=True).double())
    for ours, theirs in zip(gradients(efficient, x), gradients(plain, x), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-7)


def test_a_single_channel_among_features_leaves_the_layout(monkeypatch):
    """It is in either layout itself. In another than the block's the compiled kernels would be refused."""
    monkeypatch.setattr(dispatch, "_fallbacks", {})
    layer = resfuse.fuse(densenet._DenseLayer(17, 8, 2, 0.0).to(memory_format=torch.channels_last))
    parts = [torch.randn(2, c, 5, 5).contiguous(memory_format=torch.channels_last) for c in (16, 1)]
    layer(parts).sum().backward()
    assert not layer.resfuse_state.fallbacks and not dispatch.fallbacks()


def test_a_dense_layer_takes_a_tensor_or_a_list():
    layer = resfuse.fuse(densenet._DenseLayer(12, 4, 2, 0.0)).eval()
    x = torch.randn(2, 12, 6, 6)
    assert torch.allclose(layer(x), layer([x[:, :5], x[:, 5:]]), atol=1e-6) and not layer.resfuse_state.fallbacks


def test_a_bottleneck_takes_no_list():
    block = resfuse.fuse(nn.Sequential(Bottleneck(16, 4, downsample=nn.Sequential(
        nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)))))[0]
    with pytest.raises(TypeError):
        block([torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)])


# Statistics handed on ------------------------------------------------------------------------------------------------


def preactivated():
    torch.manual_seed(0)
    return nn.Sequential(
        modules.PreActBlock(8, 8), modules.PreActBlock(8, 12, 2), modules.PreActBottleneck(12, 3), modules.BNReLU(12)
    ).double()


def test_preactivation_networks_hand_statistics_on(monkeypatch):
    eager = preactivated()
    x = torch.randn(3, 8, 9, 8, dtype=torch.float64)
    fused = agree(eager, x)
    given = []
    working = resfuse.functional.preactivation
    monkeypatch.setattr(resfuse.functional, "preactivation",
                        lambda *a, **k: given.append(k["stats"] is not None) or working(*a, **k))
    fused.train()(x)
    assert given == [False, True, True]
    given.clear()
    middle = fused[0](x)
    middle.mul_(2)
    fused[1](middle)
    assert given == [False, False], "the tensor has been written to"
    given.clear()
    with torch.inference_mode():
        fused(x)
    assert given == [False, False, False]
