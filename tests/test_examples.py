"""The examples run, learn, and compute what the same networks compute in eager PyTorch."""

import copy

import pytest
import torch

import resfuse
from examples import hourglass, unet

EXAMPLES = {
    "unet": (unet, lambda: unet.UNet(8, 2), lambda: unet.batch(2, 16, 0.5, 0)[0]),
    "hourglass": (hourglass, lambda: hourglass.Finder(8, 2), lambda: hourglass.batch(2, 0, True)[0]),
}


@pytest.mark.parametrize("name", ["unet", pytest.param("hourglass", marks=pytest.mark.slow)])
def test_an_example_learns_and_says_what_it_keeps(name, capsys):
    assert EXAMPLES[name][0].main(["--steps", "40"]) == 0
    assert "MiB (0." in capsys.readouterr().out


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_examples_network_is_fused_and_agrees_with_eager(name):
    _, make, data = EXAMPLES[name]
    model, x = make().double(), data().double()
    found = []
    for each in (model, resfuse.unfuse(copy.deepcopy(model))):
        torch.nn.init.ones_(each.head.weight)
        each(x).square().sum().backward()
        found.append([p.grad for p in each.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-8) for a, b in zip(*found, strict=True))
    report = resfuse.report(model, input_size=tuple(x.shape))
    assert report.coverage > 0.9 and report.fallbacks == []
