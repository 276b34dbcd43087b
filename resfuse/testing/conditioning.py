"""How ill-conditioned a model's BatchNorm variances are when taken through the weights of their 1x1 convolutions."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .tolerances import kappa


@torch.no_grad()
def largest_kappa(model: nn.Module, x: Tensor) -> tuple[float, str]:
    """(kappa, name) of the worst output channel among the widening 1x1 convolutions, on the training batch x.

    In float64, on a copy. Grouped convolutions are left out; (0.0, "") if there is no such convolution.
    """
    found = [(0.0, "")]
    twin = copy.deepcopy(model).double().train()

    def watch(name: str, conv: nn.Conv2d):
        def hook(_, arguments: tuple[Tensor], output: Tensor) -> None:
            height, width = conv.stride
            rows = arguments[0][:, :, ::height, ::width].movedim(1, 3).flatten(0, 2)
            cov = torch.cov(rows.T, correction=0).reshape(conv.in_channels, -1)
            var = output.var((0, 2, 3), correction=0)
            found.append((kappa(conv.weight, cov, var).max().item(), name))

        return hook

    for name, module in twin.named_modules():
        if isinstance(module, nn.Conv2d) and _widens(module):
            module.register_forward_hook(watch(name, module))
    twin(x.double())
    return max(found)


def _widens(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (1, 1) and conv.groups == 1 and conv.out_channels >= conv.in_channels
