"""Taking blocks out of a trained network and exchanging them, without training again.

Veit, Wilber and Belongie, "Residual Networks Behave Like Ensembles of Relatively Shallow Networks" (2016).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from itertools import combinations

from torch import nn

from resfuse import blocks

from .networks import Network


def arranged(network: Network, order: Sequence[int]) -> Network:
    """The network with those of its blocks, in that order; the blocks are shared, not copied."""
    return _with_body(network, [network.body[i] for i in order])


def without(network: Network, *deleted: int) -> Network:
    """Each deleted block replaced by the identity."""
    return arranged(network, [i for i in range(network.depth) if i not in deleted])


def single_layers(network: Network) -> Network:
    """A plain network with its blocks taken apart: as many blocks of one BatchNorm, ReLU and convolution each."""
    if network.kind != "plain":
        raise ValueError(f"the layers of a {network.kind} network lie beside a skip and cannot stand alone")
    layers = []
    for block in network.body:
        for bn, conv in ((block.bn1, block.conv1), (block.bn2, block.conv2)):
            first = blocks.BNReLU(bn.num_features)
            first.bn = bn
            layers.append(nn.Sequential(first, conv))
    return _with_body(network, layers)


def swapped(depth: int, swaps: int, rng: random.Random) -> list[int]:
    """0..depth-1 after exchanging that many random pairs."""
    order = list(range(depth))
    for _ in range(swaps):
        a, b = rng.sample(range(depth), 2)
        order[a], order[b] = order[b], order[a]
    return order


def kendall_tau(order: Sequence[int]) -> float:
    """How far an order without ties is the sorted one: the share of pairs in order less that out of it."""
    pairs = [1 if a < b else -1 for a, b in combinations(order, 2)]
    return sum(pairs) / len(pairs)


def _with_body(network: Network, body: Sequence[nn.Module]) -> Network:
    found = copy.copy(network)
    found._modules = {**network._modules, "body": nn.Sequential(*body)}  # copy.copy shares the dictionary
    found.depth = len(body)
    return found.train(network.training)
