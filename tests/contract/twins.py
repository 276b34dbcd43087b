"""Blocks of three kinds, eager and fused from the same start, and steps of both."""

import copy

import pytest
import torch
from torch import nn

import resfuse
from resfuse.testing.cases import CASES, make_block, make_gradient, make_input

BLOCKS = pytest.mark.parametrize("name", ["small-strided", "small-basic-strided", "small-preact-bottleneck"])


def twins(name: str, **options) -> tuple[nn.Module, nn.Module]:
    """(eager, fused): the same numbers, nothing shared."""
    eager = make_block(CASES[name], **options)
    return eager, resfuse.fuse(copy.deepcopy(eager))


def operands(name: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """x, which wants a gradient, and that of the output."""
    return make_input(CASES[name], dtype).requires_grad_(), make_gradient(CASES[name], dtype)


def step(block: nn.Module, x: torch.Tensor, dout: torch.Tensor) -> dict[str, torch.Tensor]:
    """Everything that a step makes: output, gradients, buffers."""
    block.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = block(x)
    out.backward(dout.to(out.dtype))
    found = {"out": out.detach(), "dx": x.grad}
    found |= {f"d{name}": p.grad for name, p in block.named_parameters() if p.grad is not None}
    return found | {name: b.clone() for name, b in block.named_buffers()}


def alike(ours: dict, theirs: dict, tolerance: float = 1e-4) -> None:
    """The same tensors, differences within tolerance of the whole: of two roundings now and then one crosses zero."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype and ours[name].shape == expected.shape, name
        if not expected.is_floating_point():
            assert torch.equal(ours[name], expected), name
            continue
        scale = max(expected.double().norm().item(), expected.numel() ** 0.5)
        assert (ours[name].double() - expected.double()).norm().item() <= tolerance * scale, name


def is_fused(block: nn.Module) -> bool:
    return isinstance(block, resfuse.blocks.mixin.FusedMixin)


def fell_back(block: nn.Module) -> set[str]:
    """Codes for which it ran its original forward."""
    return {code for _, code, _, _ in resfuse.report(block).fallbacks}
