"""The convergence benchmark trains what it says, and its results hold."""

import json
from math import isfinite
from pathlib import Path

import pytest
import torch

from benchmarks import convergence
from resfuse.bench.verify import verify

ROOT = Path(__file__).parents[1]


def layers(model):
    """Convolutions of the main branches and the classifier."""
    shortcuts = sum("downsample" in name for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d))
    return sum(isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) for m in model.modules()) - shortcuts


def test_networks_have_the_layers_of_their_names():
    for name, make in convergence.NETWORKS.items():
        assert f"{layers(make())} layers" == name


def test_the_command_writes_every_mode(tmp_path, capsys):
    path = tmp_path / "c.json"
    convergence.main(["--networks", "14 layers", "--seeds", "2", "--steps", "2", "--out", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [row["mode"] for row in rows] == ["float32", "autocast-bfloat16"]
    assert all(len(curve) == 2 for row in rows for each in row["curves"].values() for curve in each)
    assert rows[0]["loss"]["eager"] != rows[1]["loss"]["eager"]  # bfloat16 is another arithmetic
    capsys.readouterr()
    assert convergence.main(["--table", str(path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 4


@pytest.mark.slow
def test_110_layers_train_in_bfloat16():
    found = verify(range(2), 20, make=convergence.NETWORKS["110 layers"], autocast=torch.bfloat16)
    assert all(isfinite(loss) for curve in found.fused for loss in curve)
    assert found.passed and max(curve[-1] for curve in found.fused) < 2.6 < min(curve[0] for curve in found.fused)
