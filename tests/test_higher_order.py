"""Gradients that will be differentiated, of blocks whose inputs depend on one another or that are called twice."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.densenet import _DenseBlock
from torchvision.models.resnet import Bottleneck

import resfuse
from resfuse.blocks import modules


def twice():
    block = Bottleneck(8, 2)
    return nn.Sequential(block, Bottleneck(8, 2), block)


def dla():
    dla = pytest.importorskip("timm.models.dla")
    return dla.DlaTree(2, dla.DlaBasic, 8, 16, 2)


NETWORKS = {
    "dense": (lambda: _DenseBlock(3, 8, 4, 4, 0.0), "balanced"),
    "gated": (lambda: modules.ResidualBlock(8, 8, gated=True), "balanced"), "dla": (dla, "balanced"),
    "twice": (twice, "balanced"), "twice in a run": (twice, "leanest"),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_and_gradients_of_gradients(name):
    make, memory = NETWORKS[name]
    torch.manual_seed(0)
    eager, x = make().double(), torch.randn(2, 8, 6, 6, dtype=torch.float64)
    fused = resfuse.fuse(copy.deepcopy(eager), config=resfuse.FuseConfig(memory=memory))
    found = []
    for model in (eager, fused):
        leaves = [x.clone().requires_grad_(), *model.parameters()]
        out = model(leaves[0]).sin().sum()
        first = torch.autograd.grad(out, leaves, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)])
    assert resfuse.report(fused).fallbacks == []
    torch.testing.assert_close(*map(tuple, found[::-1]), rtol=1e-7, atol=1e-9)
