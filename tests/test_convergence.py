"""The convergence benchmark trains what it says, and its results hold."""

import json
from math import isfinite
from pathlib import Path

import pytest
import torch

from benchmarks import convergence
from resfuse.bench.verify import digits, train

ROOT = Path(__file__).parents[1]


def layers(model):
    """Convolutions of the main branches and the classifier."""
    shortcuts = sum("downsample" in name for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d))
    return sum(isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) for m in model.modules()) - shortcuts


def test_networks_have_the_layers_of_their_names():
    for name, make in convergence.NETWORKS.items():
        assert f"{layers(make())} layers" == name


def test_the_command_makes_every_variant_once(tmp_path, capsys):
    path = tmp_path / "c.json"
    options = ["--networks", "14 layers", "--seeds", "2", "--steps", "2", "--out", str(path)]
    convergence.main(options)
    runs = json.loads(path.read_text())["runs"]
    assert [(run["variant"], run["mode"]) for run in runs] == [each for each in convergence.VARIANTS for _ in range(2)]
    curves = {(run["variant"], run["mode"]): run["curve"] for run in runs if run["seed"] == 0}
    assert curves["resfuse", "float32"][0] == pytest.approx(curves["eager", "float32"][0], rel=1e-4)
    capsys.readouterr()
    convergence.main(options)
    assert not capsys.readouterr().out  # all are there
    assert convergence.main(["--table", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 5 and "(seed from seed)" in lines[2] and "(seed from seed)" not in "".join(lines[3:])


def test_bfloat16_is_another_arithmetic():
    make, data = convergence.NETWORKS["14 layers"], list(digits())
    exact, rounded = (train(make(seed=0), data, 0, 1, autocast) for autocast in convergence.MODES.values())
    assert exact != rounded and exact == pytest.approx(rounded, rel=1e-2)


def test_last_bits_are_no_more_than_that():
    model, twin = (convergence.NETWORKS["14 layers"](seed=0) for _ in range(2))
    convergence._perturb(twin, 0)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-7, atol=0)
    assert not torch.equal(model.head.weight, twin.head.weight)


@pytest.mark.slow
def test_110_layers_train_in_bfloat16():
    run = convergence.measure("110 layers", "resfuse", "bfloat16", 0, 20)
    assert all(isfinite(loss) for loss in run["curve"]) and run["curve"][-1] < 2.6 < run["curve"][0]
