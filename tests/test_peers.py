"""`python -m resfuse peers`: what a library's tests build is fused, what fails is told apart, an empty run fails."""

import json
import sys
import textwrap
import warnings

import pytest
import torch
from rich.console import Console

import resfuse
from resfuse.bench import command, peers
from resfuse.blocks.mixin import FusedMixin

MODELS = """
    import pytest, torch
    from resfuse.blocks.mixin import FusedMixin

    def fused(model):
        return any(isinstance(module, FusedMixin) for module in model.modules())

    def step(model, size=64):
        x = torch.randn(2, 3, size, size, requires_grad=True)
        out = model.train()(x)
        out.mean().backward()
        assert out.shape == (2, 5) and all(p.grad is not None for p in (x, *model.parameters()))
        with torch.no_grad():
            assert model.eval()(x).isfinite().all()
"""
TIMM = """
    import timm
    from timm import create_model

    @pytest.mark.parametrize("name", ["resnet18", "resnet14t", "regnetx_002", "test_resnet"])
    def test_step(name):
        model = create_model(name, num_classes=5)
        assert fused(model)
        step(model)

    def test_by_any_name():
        import timm.models
        assert fused(timm.create_model("test_resnet")) and fused(timm.models.create_model("test_resnet"))

    def test_features():
        model = timm.create_model("resnet18", features_only=True)
        assert fused(model) and [f.shape[1] for f in model(torch.randn(2, 3, 64, 64))] == [64, 64, 128, 256, 512]

    def test_script():
        model = timm.create_model("test_resnet").eval()
        x = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(torch.jit.script(model)(x), model(x))
        assert fused(model)

    @pytest.mark.parametrize("name", ["1-resnet", "1-none"])
    def test_model_forward_fx(name):
        model = timm.create_model("test_resnet").eval()
        if "resnet" in name:
            model(torch.randn(1, 3, 64, 64))
        assert False, name
"""
TORCHVISION = """
    from torchvision import models
    from torchvision.models import get_model, resnet18

    @pytest.mark.parametrize("name", ["resnet18", "regnet_x_400mf", "densenet121"])
    def test_step(name):
        model = get_model(name, num_classes=5)
        assert fused(model)
        step(model)

    def test_by_any_name():
        builder = models.get_model_builder("resnet18")
        assert builder is resnet18 is models.resnet18 is models.resnet.resnet18 and builder.__name__ == "resnet18"
        assert fused(builder())

    def test_offline():
        raise OSError("no network\\nmore")
"""


def checkout(folder, library, text):
    path = folder / peers.FILES[library][0]
    path.parent.mkdir()
    path.write_text(textwrap.dedent(MODELS + text))
    return folder


def run(folder, library, text):
    """As `peers` runs it, but in this process, which has imported the library: exit code, outcomes and counts."""
    path, out = checkout(folder, library, text) / peers.FILES[library][0], folder / "results.json"
    before = set(sys.modules)
    code = pytest.main([
        "-q", "--tb=no", "-p", "no:cacheprovider", "--import-mode=importlib", "--rootdir", str(folder),
        "-p", "resfuse.testing.peers", "--peer", library, "--peer-results", str(out), str(path),
    ])  # fmt: skip
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) == str(path):  # the next folder's has the same name
            del sys.modules[name]
    tests = {name.partition("::")[2]: test for name, test in json.loads(out.read_text()).items()}
    return code, {name: test["outcome"] for name, test in tests.items()}, tests


def test_models_of_timm_are_fused_and_their_tests_pass(tmp_path):
    timm = pytest.importorskip("timm")
    builder, script = timm.create_model, torch.jit.script
    code, outcomes, tests = run(tmp_path, "timm", TIMM)
    assert outcomes.pop("test_model_forward_fx[1-resnet]") == "xfailed", "it is known to fail after a fused call"
    assert outcomes.pop("test_model_forward_fx[1-none]") == "failed" and code == 1, "without one it is not"
    assert set(outcomes.values()) == {"passed"} and len(outcomes) == 7
    assert tests["test_step[resnet18]"]["counts"] == {"models": 1, "fused_models": 1, "blocks": 9, "fused_calls": 18}
    assert tests["test_by_any_name"]["counts"]["fused_models"] == 2
    assert timm.create_model is builder and torch.jit.script is script, "as before"


def test_a_builder_inside_a_builder_counts_once():
    from resfuse.testing import peers as plugin

    def block():
        return plugin._fused(lambda: resfuse.blocks.Bottleneck(16, 8))()

    plugin.tally.clear()
    assert isinstance(plugin._fused(block)(), FusedMixin)
    assert plugin.tally == {"models": 1, "fused_models": 1, "blocks": 1}


def test_a_run_in_which_nothing_is_fused_fails(tmp_path, capsys):
    pytest.importorskip("timm")
    text = """
    import timm
    def test_forward():
        assert timm.create_model("test_vit").eval()(torch.randn(1, 3, 160, 160)).shape[0] == 1
    def test_built_alone():
        assert fused(timm.create_model("test_resnet"))
    """
    code, outcomes, _ = run(tmp_path, "timm", text)
    assert code == 1 and set(outcomes.values()) == {"passed"}
    assert "no test ran a fused block of timm" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_runs_the_tests_of_a_checkout(tmp_path, capfd):
    pytest.importorskip("torchvision")
    out = tmp_path / "peers.json"
    folder = str(checkout(tmp_path, "torchvision", TORCHVISION))
    code = command.main(["peers", "--library", "torchvision", "--json", str(out), folder, "-k", "not nothing"])
    results = json.loads(out.read_text())
    text = capfd.readouterr().out
    assert code == 0 and "4 passed, 1 failed (1 of the failed fail without fusing too)" in text, text
    assert results["command"] == "python -m resfuse peers --library torchvision PATH -k 'not nothing'"
    assert results["outcomes"] == {"passed": 4, "failed": 1} and results["fused_tests"] == 3
    assert results["failed"] == {
        "test/test_models.py::test_offline": {"text": "OSError: no network", "without": "OSError: no network"}
    }
    assert results["models"] == results["fused_models"] == 4 and results["version"] and results["checkout"] is None


@pytest.mark.parametrize("without, code", [({"outcome": "failed", "text": ""}, 0), ({"outcome": "passed"}, 1), ({}, 1)])
def test_what_fails_only_when_fused_fails_the_command(tmp_path, monkeypatch, without, code):
    tests = {
        "test/test_models.py::a": {"outcome": "passed", "text": "", "counts": {"fused_calls": 3}},
        "test/test_models.py::b": {"outcome": "failed", "text": "E", "counts": {"original_calls:dtype": 2}},
    }
    asked = []

    def _pytest(folder, arguments):
        asked.append(arguments)
        return 1, {"test/test_models.py::b": without} if "--peer-eager" in arguments else tests

    monkeypatch.setattr(peers, "_pytest", _pytest)
    folder = checkout(tmp_path, "torchvision", "")
    out = tmp_path / "peers.json"
    assert peers.run("torchvision", folder, ["-x"], out, Console()) == code
    assert asked[0] == [str(folder / "test/test_models.py"), "--peer", "torchvision", "-x"]
    assert asked[1][0] == str(folder / "test/test_models.py::b")
    assert json.loads(out.read_text())["original_calls"] == {"dtype": 2}


def test_a_folder_without_their_tests_is_refused(tmp_path, capsys):
    assert command.main(["peers", "--library", "timm", str(tmp_path)]) == 1
    assert "give the path of a checkout of timm" in " ".join(capsys.readouterr().out.split())


def test_what_fx_traced_from_a_fused_model_can_be_scripted():
    torchvision = pytest.importorskip("torchvision")
    from torchvision.models.feature_extraction import create_feature_extractor

    model = resfuse.fuse(torchvision.models.resnet18().eval())
    assert isinstance(model, FusedMixin), "its stem is the model itself, whose forward fx reads"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.jit.script(create_feature_extractor(model, ["layer2"]))
    assert program(torch.randn(1, 3, 64, 64))["layer2"].shape == (1, 128, 8, 8)


def test_the_package_needs_no_pytest(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytest", None)
    for name in [name for name in sys.modules if name.startswith("resfuse.bench")]:
        monkeypatch.delitem(sys.modules, name)
    from resfuse.bench import command

    assert "peers" in command.parser().format_help()
