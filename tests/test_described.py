"""Blocks of timm and torchvision that are described by their parts, and rows of convolutions in nn.Sequential."""

import copy
import types
from collections import OrderedDict

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.quantization.resnet import QuantizableBottleneck

import resfuse
from resfuse import functional
from resfuse.arguments import ArgumentError
from resfuse.blocks import _segments, preactivated
from resfuse.blocks.described import BLOCKS
from resfuse.blocks.mixin import FusedMixin, original_name
from resfuse.kernels import measured

timm = pytest.importorskip("timm")
from library_blocks import BUILDERS, C, down  # noqa: E402
from timm.models import _efficientnet_blocks as efficientnet  # noqa: E402
from timm.models import resnet  # noqa: E402

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


def test_a_network_whose_stem_was_emptied_is_fused_without_it():
    model = BUILDERS["resnet"]()
    model.conv1 = nn.Sequential()
    assert "layer1.0" in [name for name, *_ in resfuse.explain(model).fused]


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
