"""How alike the gradients at neighbouring inputs are, at initialisation.

Balduzzi et al., "The Shattered Gradients Problem: If resnets are the answer, then what is the question?" (2017): in
plain networks neighbouring gradients become unrelated as depth grows, in residual ones much more slowly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .networks import Network


@torch.no_grad()
def calibrate(network: Network, images: Tensor) -> Network:
    """Eval mode with the statistics of these images. So a network that was not trained is normalised as one in
    training, and yet each output a function of its own input alone."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    network.train()(images)
    for norm in norms:
        norm.momentum = 0.1
    return network.eval()


def line(a: Tensor, b: Tensor, points: int) -> Tensor:
    """Points [points, C, H, W] from image a to image b, both included, at equal distances."""
    t = torch.linspace(0, 1, points, device=a.device, dtype=a.dtype).view(-1, 1, 1, 1)
    return a + t * (b - a)


def input_gradients(network: Network, inputs: Tensor) -> Tensor:
    """Gradient [N, values] of the first logit by each input."""
    inputs = inputs.detach().requires_grad_()
    return torch.autograd.grad(network(inputs)[:, 0].sum(), inputs)[0].flatten(1)


def autocorrelation(gradients: Tensor, lags: int) -> list[float]:
    """Mean cosine of two gradients 1..lags places apart, their mean over the line left in: a constant gradient has 1,
    independent ones 0."""
    unit = F.normalize(gradients, dim=1)
    return [(unit[lag:] * unit[:-lag]).sum(1).mean().item() for lag in range(1, lags + 1)]
