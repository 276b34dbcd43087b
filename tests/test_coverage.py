"""`python -m resfuse coverage`: shares of models whose answer is known, without a weight being made. `agree`: a model
beside its eager twin."""

import json

import pytest
from rich.console import Console

from resfuse.bench import agree, agreement, coverage


def test_shares_of_known_models(tmp_path, capsys):
    path = tmp_path / "coverage.json"
    coverage.show("torchvision", ["resnet18", "alexnet", "vgg11_bn", "mobilenet_v2"], path, Console(width=100))
    assert "3 convolutional models with BatchNorm" in capsys.readouterr().out
    rows = {row.model: row for row in coverage.load(path)}
    assert list(rows) == ["resnet18", "vgg11_bn", "mobilenet_v2"], "alexnet has no BatchNorm"
    assert rows["resnet18"].coverage == 1 and rows["resnet18"].others == {} and rows["resnet18"].blocks == 9
    assert rows["mobilenet_v2"].coverage == 1 and rows["mobilenet_v2"].others == {}
    assert rows["vgg11_bn"].input_size == [1, 3, 224, 224]
    lines = coverage.families(json.loads(path.read_text()))
    assert lines[2:] == [
        "| mobilenetv2 | 1 | 1 | 100% |  |", "| resnet | 1 | 1 | 100% |  |",
        "| vgg | 1 | 1 | 100% |  |",
    ]  # fmt: skip


def test_a_model_that_looks_at_values_is_built_with_them():
    model, size = coverage.build("torchvision", "regnet_x_400mf")
    assert not any(p.is_meta for p in model.parameters()) and size == (1, 3, 224, 224)
    assert all(p.is_meta for p in coverage.build("torchvision", "resnet18")[0].parameters())


def test_models_are_run_once_beside_their_twins(tmp_path, capsys, monkeypatch):
    path = tmp_path / "agree.json"
    assert agree.show("torchvision", ["alexnet", "mnasnet0_5"], path, Console(width=100))
    (row,) = agree.load(path)
    assert row.model == "mnasnet0_5" and row.agrees and row.input_size == [2, 3, 64, 64] and row.parameters == 2218512
    monkeypatch.setattr(agree, "LARGEST", 1e6)
    assert agree.show("torchvision", ["mnasnet0_5", "mobilenet_v3_small"], path, Console(width=100))
    assert agree.load(path)[0] == row, "it is not run again"
    assert "2 models: 1 agree, 0 have nothing to fuse, 1 too large to run, 0 do not agree" in capsys.readouterr().out


def test_a_model_that_differs_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(agreement, "TOLERANCE", 0.0)
    path = tmp_path / "agree.json"
    assert not agree.show("torchvision", ["mnasnet0_5"], path, Console(width=100))
    assert "mnasnet0_5: {" in capsys.readouterr().out


def test_what_has_nothing_to_fuse_is_not_run():
    model, size = coverage.build("torchvision", "vgg11_bn")
    for module in model.features:
        module.register_forward_hook(lambda *_: None)
    row = agree.row("torchvision", "vgg11_bn", model, size)
    assert row.reason == agree.NOTHING and row.agreement is None and not row.agrees


def test_a_detection_model_agrees_in_its_losses(tmp_path, capsys):
    """Its forward takes what it shall find; the share is of its backbone, which sees all of the image."""
    path = tmp_path / "agree.json"
    assert agree.show("torchvision", ["fasterrcnn_mobilenet_v3_large_320_fpn"], path, Console(width=100))
    (row,) = agree.load(path)
    assert row.family == "detection.faster_rcnn" and row.agreement["gradients"] > 0
    model, size = coverage.build("torchvision", row.model)
    assert 0.5 < coverage.row(row.model, model, size).coverage < 1, "the pyramid has no BatchNorm"


@pytest.mark.slow
@pytest.mark.parametrize("library", coverage.LIBRARIES)
def test_every_model_agrees_with_its_twin(library, tmp_path):
    """An hour or two."""
    assert agree.show(library, [], tmp_path / "agree.json", Console(width=100))
