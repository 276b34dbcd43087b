"""fuse, unfuse, explain, report, disabled on torchvision's models."""

import copy
import io
import pickle
import threading
import warnings

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import resfuse
from resfuse.kernels import dispatch


def small(block=Bottleneck, **settings) -> ResNet:
    torch.manual_seed(0)
    return ResNet(block, [2, 1, 1, 1], num_classes=10, **settings)


def batch(n=2, size=64):
    return torch.randn(n, 3, size, size)


RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
           "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2")
DENSENETS = ("densenet121", "densenet161", "densenet169", "densenet201")


@pytest.mark.parametrize("name", RESNETS)
def test_all_of_torchvisions_resnets_is_fused(name):
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    report = resfuse.explain(model)
    assert len(report.fused) == sum(isinstance(m, (Bottleneck, BasicBlock, ResNet)) for m in model.modules())
    assert report.skipped == [] and report.coverage == 1
    assert not any(isinstance(m, resfuse.blocks.mixin.FusedMixin) for m in model.modules()), "explain changed it"


@pytest.mark.parametrize("name", DENSENETS)
def test_all_of_torchvisions_densenets_is_fused(name):
    with torch.device("meta"):
        report = resfuse.explain(getattr(torchvision.models, name)())
    assert report.skipped == [] and report.coverage == 1
    assert {kind for _, kind, _ in report.fused} == {"Sequential", "_DenseLayer", "_Transition"}


def test_fuse_is_in_place_idempotent_and_undone():
    model = small()
    keys, parameters = list(model.state_dict()), {id(p) for p in model.parameters()}
    classes = [type(m) for m in model.modules()]
    assert resfuse.fuse(resfuse.fuse(model)) is model
    fused = [m for m in model.modules() if isinstance(m, resfuse.blocks.mixin.FusedMixin)]
    assert [type(m).__name__ for m in fused] == ["ResNet"] + 5 * ["Bottleneck"]
    assert list(model.state_dict()) == keys and {id(p) for p in model.parameters()} == parameters
    assert resfuse.unfuse(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert not any("_resfuse_state" in m.__dict__ for m in model.modules())


def test_one_training_step_agrees_with_eager_in_float64():
    eager = small().double()
    fused = resfuse.fuse(copy.deepcopy(eager))
    x = batch(4).double()
    for model in (eager, fused):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for (name, a), b in zip(fused.state_dict().items(), eager.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8), name
    assert resfuse.report(fused, input_size=(1, 3, 64, 64)).fallbacks == []


def saved_and_loaded(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


WAYS_TO_COPY = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)), "deepcopy": copy.deepcopy, "copy": copy.copy,
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("way", WAYS_TO_COPY)
def test_copies_stay_fused_and_compute_the_same(way):
    model = resfuse.fuse(small()).eval()
    other = WAYS_TO_COPY[way](model)
    assert type(other.layer1[0]) is type(model.layer1[0])
    x = batch()
    assert torch.equal(other(x), model(x))
    resfuse.unfuse(other if way != "copy" else model)
    assert type((other if way != "copy" else model).layer1[0]) is Bottleneck


def test_state_dicts_load_both_ways():
    eager, fused = small(), resfuse.fuse(small())
    assert list(eager.state_dict()) == list(fused.state_dict())
    fused.load_state_dict(eager.state_dict(), strict=True, assign=True)
    eager.load_state_dict(fused.state_dict(), strict=True)


def test_filter_fn_leaves_blocks_alone():
    model = resfuse.fuse(small(), filter_fn=lambda module, fqn: fqn.startswith("layer1"))
    assert [type(layer[0]) is Bottleneck for layer in (model.layer1, model.layer2, model.layer4)] == [False, True, True]


def test_strict_raises_with_every_skip_and_changes_nothing():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), small())
    with pytest.raises(resfuse.FuseError, match="0 +no_plan"):
        resfuse.fuse(model, strict=True)
    assert type(model[1]) is ResNet and type(model[1].layer1[0]) is Bottleneck
    resfuse.fuse(nn.Sequential(Bottleneck(16, 4)), strict=True)


def test_nothing_to_fuse_warns():
    with pytest.warns(UserWarning, match="fused nothing in Sequential"):
        resfuse.fuse(nn.Sequential(nn.Linear(2, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resfuse.fuse(nn.Sequential(Bottleneck(16, 4)))


@pytest.mark.parametrize("function", [resfuse.fuse, resfuse.unfuse, resfuse.explain, resfuse.report])
def test_not_a_module(function):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        function(3)


LATER = [dict(memory="least"), dict(memory=0.0), dict(memory=1.5), dict(memory=1), dict(deterministic=True)]


@pytest.mark.parametrize("setting", LATER, ids=str)
def test_settings_of_later_versions_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        resfuse.FuseConfig(**setting)


@pytest.mark.parametrize("backend, reason", [
    ("cpu", "primitive_missing.*scale_weight"), ("cuda", "device: the CUDA kernels do not run on cpu"),
])  # fmt: skip
def test_a_backend_that_cannot_run_a_block_alone_is_refused_with_every_reason(backend, reason):
    model = nn.Sequential(Bottleneck(16, 4))
    with pytest.raises(resfuse.Unsupported, match=reason):
        resfuse.fuse(model, config=resfuse.FuseConfig(backend=backend))
    assert type(model[0]) is Bottleneck


def test_exact_types_only():
    class Mine(Bottleneck):
        pass

    report = resfuse.explain(nn.Sequential(Mine(16, 4)), input_size=(1, 16, 8, 8))
    assert not report.fused and {code for _, code, _ in report.skipped} == {"no_plan"}


CHANGES = {
    "hook": (lambda b: b.conv2.register_forward_hook(lambda *_: None), "inner_hook"),
    "pre-hook": (lambda b: b.bn1.register_forward_pre_hook(lambda *_: None), "inner_hook"),
    "backward hook": (lambda b: b.conv1.register_full_backward_pre_hook(lambda *_: None), "inner_hook"),
    "own forward": (lambda b: setattr(b.conv1, "forward", b.conv1.forward), "own_forward"),
    "activation": (lambda b: setattr(b, "relu", nn.SiLU()), "module_type"),
    "norm": (lambda b: setattr(b, "bn2", nn.GroupNorm(2, 4)), "module_type"),
    "convolution": (lambda b: setattr(b, "conv2", nn.Sequential(b.conv2)), "module_type"),
    "padding mode": (lambda b: setattr(b.conv2, "padding_mode", "reflect"), "padding"),
    "named padding": (lambda b: setattr(b.conv2, "padding", "same"), "padding"),
    "shared norm": (lambda b: setattr(b, "bn2", b.bn1), "shared_norm"),
    "downsample": (lambda b: setattr(b, "downsample", nn.Sequential(nn.AvgPool2d(1))), "downsample"),
    "parametrization": (lambda b: nn.utils.parametrizations.weight_norm(b.conv1), "module_type"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_fused_path_does_not_cover_runs_the_original_and_is_counted(change):
    torch.manual_seed(0)
    block = Bottleneck(16, 4)
    fused = resfuse.fuse(nn.Sequential(copy.deepcopy(block)))
    for b in (block, fused[0]):
        CHANGES[change][0](b)
    x = torch.randn(2, 16, 6, 6)
    assert torch.equal(fused(x), block(x))
    fallbacks = resfuse.report(fused, input_size=(1, 16, 6, 6)).fallbacks
    assert [(fqn, code, count) for fqn, code, _, count in fallbacks] == [("0", CHANGES[change][1], 1)]
    assert CHANGES[change][1] in str(resfuse.report(fused, input_size=(1, 16, 6, 6)))


def test_a_hook_on_the_shortcut_fires():
    shortcut = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))
    model, seen = resfuse.fuse(nn.Sequential(Bottleneck(16, 4, downsample=shortcut))), []
    shortcut.register_forward_hook(lambda *_: seen.append(1))
    model(torch.randn(2, 16, 6, 6))
    assert seen == [1]


def test_a_removed_hook_gives_the_fused_path_back():
    model = resfuse.fuse(nn.Sequential(Bottleneck(16, 4)))
    seen = []
    handle = model[0].conv2.register_forward_hook(lambda *_: seen.append(1))
    model(torch.randn(2, 16, 6, 6))
    handle.remove()
    model(torch.randn(2, 16, 6, 6))
    assert len(seen) == 1 and model[0].resfuse_state.fallbacks["inner_hook"][0] == 1


def test_hooks_on_the_block_fire_and_it_stays_fused():
    model, seen = resfuse.fuse(nn.Sequential(Bottleneck(16, 4))), []
    model[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    model(torch.randn(2, 16, 6, 6))
    assert seen == [(2, 16, 6, 6)] and not model[0].resfuse_state.fallbacks


def test_disabled_runs_the_original_forward(monkeypatch):
    model, called = resfuse.fuse(nn.Sequential(Bottleneck(16, 4))), []
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: called.append(1) or nn.functional.conv2d(
        x, self.weight, self.bias, self.stride, self.padding))
    x = torch.randn(2, 16, 6, 6)
    model(x)
    assert not called
    with resfuse.disabled(), resfuse.disabled():
        model(x)
    assert len(called) == 3 and not model[0].resfuse_state.fallbacks
    model(x)
    assert len(called) == 3


def test_transforms_and_tracing_run_the_original():
    model = resfuse.fuse(nn.Sequential(Bottleneck(16, 4))).eval()
    x = torch.randn(2, 16, 6, 6)
    expected = resfuse.unfuse(copy.deepcopy(model))(x)
    assert torch.allclose(torch.func.vmap(model)(x[None])[0], expected, atol=1e-6)
    assert torch.allclose(torch.jit.trace(model, x)(x), expected, atol=1e-6)
    grads = torch.func.grad(lambda x: model(x).sum())(x)
    leaf = x.clone().requires_grad_()
    model(leaf).sum().backward()
    assert torch.allclose(grads, leaf.grad, atol=1e-5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(model(dual)).tangent is not None
    codes = set(model[0].resfuse_state.fallbacks)
    assert {"forward_ad", "tracing"} <= codes and codes & {"functorch", "input_type"}


def test_feature_extraction_traces_the_original():
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    assert get_graph_node_names(resfuse.fuse(small())) == get_graph_node_names(small())
    extractor = create_feature_extractor(resfuse.fuse(small()).eval(), ["layer1.0.conv2"])
    assert extractor(batch(1))["layer1.0.conv2"].shape[1] == 64


def test_bottleneck_is_a_drop_in_for_torchvisions_class():
    assert issubclass(resfuse.Bottleneck, Bottleneck)
    torch.manual_seed(0)
    model = ResNet(resfuse.Bottleneck, [1, 1, 1, 1], zero_init_residual=True)
    assert not model.layer1[0].bn3.weight.any(), "zero_init_residual was skipped"
    torch.manual_seed(0)
    twin = ResNet(Bottleneck, [1, 1, 1, 1], zero_init_residual=True)
    twin.load_state_dict(model.state_dict())
    x = batch(3)
    assert torch.allclose(model(x), twin(x), rtol=1e-3, atol=1e-4)
    assert type(pickle.loads(pickle.dumps(model)).layer1[0]) is resfuse.Bottleneck
    assert len(resfuse.report(model).fused) == 4 and not resfuse.report(model).fallbacks


class Mine(resfuse.Bottleneck):
    pass


def test_a_subclass_of_bottleneck_copies_and_is_reported():
    model = nn.Sequential(Mine(16, 4))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[0]) is Mine
        other(torch.randn(2, 16, 6, 6)).sum().backward()
    assert [name for _, name, _ in resfuse.report(model, input_size=(1, 16, 8, 8)).fused] == ["Mine"]
    with pytest.warns(UserWarning, match="Mine is defined as a fused block"):
        resfuse.unfuse(model)
    assert type(model[0]) is Mine


def test_the_class_itself_pickles():
    assert pickle.loads(pickle.dumps(resfuse.Bottleneck)) is resfuse.Bottleneck


def test_explaining_fires_no_hook_and_moves_no_statistic():
    model, seen = small(), []
    model.layer1[0].register_forward_hook(lambda *_: seen.append(1))
    before = copy.deepcopy(model.state_dict())
    assert resfuse.explain(model, input_size=(1, 3, 32, 32)).coverage > 0.9
    assert not seen and len(model.layer1[0]._forward_hooks) == 1
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_disabled_is_of_this_thread():
    model, seen = resfuse.fuse(nn.Sequential(Bottleneck(16, 4))), []
    worker = threading.Thread(target=lambda: seen.append(resfuse.blocks.mixin.call_refusal(torch.ones(1, 1, 1, 1))))
    with resfuse.disabled():
        worker.start()
        worker.join()
        assert resfuse.blocks.mixin.call_refusal(torch.ones(1, 1, 1, 1)).code == "disabled"
    assert seen == [None] and model is not None


def test_a_refusal_of_a_kernel_set_is_reported():
    """NCHW samples too large to be converted: the CPU set reads channels_last."""
    if dispatch.kernels("auto", "cpu", torch.float32).chosen["apply"] != "cpu":
        pytest.skip("native_missing: the native library is not built")
    model = resfuse.fuse(nn.Sequential(Bottleneck(16, 4)))
    model(torch.randn(2, 16, 64, 64))
    assert ("conv_stats", "cpu", "layout") in {row[:3] for row in resfuse.report(model).kernels}


def test_a_named_backend_serves_everything_itself():
    assert set(dispatch.kernels("eager", "cpu", torch.float32).chosen.values()) == {"eager"}


def test_layout_note_and_coverage():
    model = small()
    report = resfuse.report(resfuse.fuse(model))
    assert [note.code for note in report.notes] == ["layout_nchw"] and "channels_last" in str(report)
    assert not resfuse.report(model.to(memory_format=torch.channels_last)).notes
    assert report.coverage == 1
    assert 0 < resfuse.explain(model, filter_fn=lambda m, fqn: fqn == "layer1.0").coverage < 0.5
    assert resfuse.explain(nn.Sequential(Bottleneck(16, 4)), input_size=(1, 16, 8, 8)).coverage == 1
    assert resfuse.explain(nn.Sequential(Bottleneck(16, 4))).coverage is None, "3 channels do not fit"


def test_report_says_what_was_not_converted():
    report = resfuse.report(nn.Sequential(nn.Conv2d(3, 3, 1), small()))
    assert not report.fused and {code for _, code, _ in report.skipped} == {"no_plan", "not_converted"}


def test_a_shared_block_is_fused_once():
    block = Bottleneck(16, 4)
    model = resfuse.fuse(nn.Sequential(block, nn.Sequential(block)))
    assert len(resfuse.report(model, input_size=(1, 16, 8, 8)).fused) == 1


def test_a_parameter_of_a_subclass_runs_the_original_forward():
    """A subclass may do anything; here it does nothing."""
    model = resfuse.fuse(nn.Sequential(Bottleneck(16, 4)))
    weight = model[0].conv1.weight.detach()
    model[0].conv1._parameters["weight"] = torch.Tensor._make_subclass(type("Own", (torch.Tensor,), {}), weight)
    model(torch.randn(2, 16, 6, 6))
    assert list(model[0].resfuse_state.fallbacks) == ["parameter_type"]


def test_mutated_parameters_are_seen():
    model = resfuse.fuse(nn.Sequential(Bottleneck(16, 4))).eval()
    x = torch.randn(2, 16, 6, 6)
    before = model(x)
    model[0].bn3.bias.data.add_(1)
    model[0].conv3.weight.data.mul_(2)
    expected = resfuse.unfuse(copy.deepcopy(model))(x)
    assert not torch.allclose(model(x), before) and torch.allclose(model(x), expected, atol=1e-5)


def test_compiled_models_run_the_original_forward():
    model = resfuse.fuse(nn.Sequential(Bottleneck(16, 4)))
    explanation = torch._dynamo.explain(model)(torch.randn(2, 16, 6, 6))
    assert explanation.graph_break_count == 0


def test_checkpoint_advances_counters_as_stock_does():
    from torch.utils.checkpoint import checkpoint

    counters = []
    for model in (Bottleneck(16, 4), resfuse.fuse(nn.Sequential(Bottleneck(16, 4)))[0]):
        x = torch.randn(2, 16, 6, 6, requires_grad=True)
        checkpoint(model, x, use_reentrant=False).sum().backward()
        counters.append(int(model.bn1.num_batches_tracked))
    assert counters[0] == counters[1]
