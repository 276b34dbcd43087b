"""Eager and fused blocks beside a float64 twin."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .cases import Case, make_block, make_gradient, make_input
from .tolerances import check, relative_error

Fuse = Callable[[nn.Module], nn.Module]
KINK = 64 * torch.finfo(torch.float32).eps  # several standard deviations of a float32 block's rounding error


class Mode(NamedTuple):
    """How a block is run: the dtype of its parameters, and autocast's dtype or None."""

    parameters: torch.dtype
    autocast: torch.dtype | None = None

    @property
    def compute(self) -> torch.dtype:
        """The dtype of activations, which the tolerance goes by."""
        return self.autocast or self.parameters


MODES = {
    "float32": Mode(torch.float32),
    "bfloat16": Mode(torch.bfloat16),
    "float16": Mode(torch.float16),
    "autocast-bfloat16": Mode(torch.float32, torch.bfloat16),
    "autocast-float16": Mode(torch.float32, torch.float16),
}


class Errors(NamedTuple):
    """Relative errors against float64 of one result, one a seed."""

    eager: list[float]
    ours: list[float]


def run(block: nn.Module, x: Tensor, dout: Tensor, autocast_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """One forward and backward of `block`, whose running statistics advance.

    x is left alone, dout [output's shape] is cast to the output's dtype. Returns `out`, `dx`, `d<parameter>` for each
    parameter that asks for a gradient, and copies of the running statistics under their own names.
    """
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    parameters = {name: p for name, p in block.named_parameters() if p.requires_grad}
    context = torch.autocast(x.device.type, dtype=autocast_dtype) if autocast_dtype else nullcontext()
    with context:
        out = block(x)
    dx, *gradients = torch.autograd.grad(out, [x, *parameters.values()], dout.to(out.dtype))
    named = {f"d{name}": g for name, g in zip(parameters, gradients, strict=True)}
    buffers = {name: b.detach().clone() for name, b in block.named_buffers() if b.is_floating_point()}
    return {"out": out.detach(), "dx": dx, **named, **buffers}


def compare(block: nn.Module, x: Tensor, dout: Tensor, fuse: Fuse, mode: Mode) -> dict[str, tuple[float, float]]:
    """(eager's error, ours) of every result of `run`, on copies of `block`; parameters and x are in mode's dtypes.

    The gradient is taken as 0 where the block's last ReLU sits on its kink to float32 rounding: which side an
    element falls on is chance there, and one of them outweighs all rounding errors of a float32 gradient.
    """
    eager, fused, twin = (copy.deepcopy(block) for _ in range(3))
    twin = twin.double()
    dout = dout.masked_fill(_near_kink(twin, x.double()), 0.0)
    reference = run(twin, x.double(), dout.double())
    eager_results = run(eager, x, dout, mode.autocast)
    ours = run(fuse(fused), x, dout, mode.autocast)
    if set(ours) != set(reference):
        raise AssertionError(f"results differ in name: {sorted(set(ours) ^ set(reference))}")
    return {
        name: (relative_error(eager_results[name], ref), relative_error(ours[name], ref))
        for name, ref in reference.items()
    }


def compare_case(
    case: Case,
    fuse: Fuse,
    mode: Mode,
    seeds: Iterable[int] = range(10),
    *,
    training: bool = True,
    memory_format: torch.memory_format = torch.channels_last,
    device: torch.device | str = "cpu",
    kinks: bool = True,
) -> dict[str, Errors]:
    """Errors of every result of `run` over seeds: each seed draws its own block, input and gradient."""
    errors: dict[str, Errors] = {}
    for seed in seeds:
        block = make_block(case, seed, mode.parameters, memory_format, device, kinks).train(training)
        x = make_input(case, mode.compute, memory_format, seed, device)
        dout = make_gradient(case, mode.compute, memory_format, seed, device)
        for name, (eager, ours) in compare(block, x, dout, fuse, mode).items():
            entry = errors.setdefault(name, Errors([], []))
            entry.eager.append(eager)
            entry.ours.append(ours)
    return errors


def check_case(
    case: Case, fuse: Fuse, mode: Mode, seeds: Iterable[int] = range(10), *, kinks: bool = True, **options
) -> None:
    """Raise AssertionError, naming case and result, unless every result passes the tolerance rule.

    options as in `compare_case`. Float32 variances are left to `tolerances.check_variance`, which needs their kappa.
    """
    for name, errors in compare_case(case, fuse, mode, seeds, kinks=kinks, **options).items():
        if not (mode.compute == torch.float32 and name.endswith("running_var")):
            check(f"{case.name}: {name}", errors.ours, errors.eager, mode.compute, kinks)


def _near_kink(twin: nn.Module, x: Tensor) -> Tensor:
    """Where the input of the block's last ReLU, of rms r, is below KINK * r: bool [output's shape], or False of a block
    without a ReLU module of its own. No statistics advance."""
    if not isinstance(getattr(twin, "relu", None), nn.ReLU):
        return torch.tensor(False, device=x.device)
    seen = []
    handle = twin.relu.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].clone()))
    statistics = {name: b.clone() for name, b in twin.named_buffers()}
    try:
        with torch.no_grad():
            twin(x)
    finally:
        handle.remove()
        for name, b in twin.named_buffers():
            b.copy_(statistics[name])
    return seen[-1].abs() < KINK * seen[-1].square().mean().sqrt()
