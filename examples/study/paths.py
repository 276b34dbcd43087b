"""Gradients through single paths of a residual network: at each block through its branch or through its skip.

A network of n blocks `x + f(x)` is a sum over 2^n paths, of which binomial(n, k) go through k branches; so is the
gradient. Forward every path sees the network's own activations; backward each block passes only one of its summands.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse import blocks

from .networks import Network


def branches(network: Network) -> list[nn.Module]:
    """Each block's `f`: a plain block with its parameters and statistics, which subtracting x from its output would
    give only up to the rounding of x. Eval mode, as statistics of a batch would tie its samples together."""
    found = []
    for block in network.body:
        if block.kind != "identity" or not block.preactivation:
            raise ValueError("paths are defined for pre-activated blocks with an identity skip")
        conv = block.conv1
        branch = blocks.ResidualBlock(conv.in_channels, conv.out_channels, preactivation=True, shortcut="none")
        branch.to(conv.weight).load_state_dict(block.state_dict())  # in its dtype first, or float64 is rounded
        found.append(branch.eval())
    return found


def path_gradient(
    network: Network, fs: Sequence[nn.Module], chosen: Collection[int], images: Tensor, labels: Tensor
) -> Tensor:
    """Gradient [N, C, H, W] of each image's own loss by the image, through the branch of the chosen blocks and the skip
    of the others. fs: of `branches(network)`."""
    images = images.detach().requires_grad_()
    x = network.stem(images)
    for i, f in enumerate(fs):
        x = f(x) + x.detach() if i in chosen else x + f(x.detach()).detach()
    loss = F.cross_entropy(network.classify(x), labels, reduction="sum")
    return torch.autograd.grad(loss, images)[0]


def gradient_norms(
    network: Network, images: Tensor, labels: Tensor, draws: int, rng: random.Random
) -> list[list[float]]:
    """For each length 0..n the mean gradient norm over images, of `draws` random paths of that length (all, if fewer
    exist)."""
    fs = branches(network)
    lengths = range(len(fs) + 1)
    found = []
    for length in lengths:
        paths = {tuple(sorted(rng.sample(range(len(fs)), length)))}
        while len(paths) < min(draws, math.comb(len(fs), length)):
            paths.add(tuple(sorted(rng.sample(range(len(fs)), length))))
        gradients = (path_gradient(network, fs, path, images, labels) for path in sorted(paths))
        found.append([gradient.flatten(1).norm(dim=1).mean().item() for gradient in gradients])
    return found


def shares(weights: Sequence[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


def by_length(norms: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Share of all paths that have each length, and share of the gradient that goes through them: a path's mean norm
    times the number of paths."""
    counts = [math.comb(len(norms) - 1, length) for length in range(len(norms))]
    carried = [count * sum(its) / len(its) for count, its in zip(counts, norms, strict=True)]
    return shares(counts), shares(carried)


def mean_length(share: Sequence[float]) -> float:
    return sum(length * part for length, part in enumerate(share))
