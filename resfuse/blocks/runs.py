"""nn.Sequential of fused residual blocks, which keeps less than they do one by one (`FuseConfig.memory`).

A run begins with its projection, whose input is kept anyway. Whatever must see a block's own output splits it: hooks on
the block, a module between blocks, a call for which the block runs its original forward.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor, nn

from .. import functional
from ..arguments import ArgumentError
from ..functional import Block
from ..kernels.interface import Reason
from . import _stats, plans
from .mixin import SOME, FusedMixin, State, original_class, wrapped

LISTS = False
OWNS = SOME


def find(model: nn.Module, chosen: Container[int]) -> dict[str, nn.Sequential]:
    """By name the Sequentials of a model that have blocks for a run; chosen: the ids of the modules to fuse."""
    return {
        fqn: module for fqn, module in model.named_modules()
        if original_class(type(module)) is nn.Sequential and (is_run(module) or plans.plan_of(module) is None)
        and any(id(child) in chosen and can_join(child) for child in module)
    }  # fmt: skip


def can_join(module: nn.Module) -> bool:
    """Whether a run may hold it, if it is fused."""
    return hasattr(plans.plan_of(module), "as_block")


def joins(module: nn.Module) -> bool:
    """Whether it is a fused block that a run may hold."""
    return isinstance(module, FusedMixin) and hasattr(module.plan, "as_block")


def is_run(module: nn.Module) -> bool:
    return isinstance(module, FusedMixin) and module.plan.__name__ == __name__


def refusal(_: nn.Sequential) -> Reason | None:
    """What its blocks refuse splits the run, no more."""
    return None


def owned(_: nn.Sequential) -> list[nn.Module]:
    return []


def watched(_: nn.Sequential) -> list[nn.Module]:
    return []


def run(sequence: nn.Sequential, x: Tensor, backend: str) -> Tensor:
    if torch.compiler.is_compiling():  # each block is a leaf of the graph's, which keeps what it keeps so
        for module in sequence:
            x = module(x)
        return x
    state, waiting = sequence.resfuse_state, []
    for name, module in sequence._modules.items():
        block = _as_block(sequence, name, module, x)
        if isinstance(block, Reason):
            state.split(block)
            x = module(_run(waiting, x, state))
            waiting = []
            continue
        if waiting and (block.projects or len(waiting) == state.every):
            x = _run(waiting, x, state)
            waiting = []
        waiting.append((module, block))
    return _run(waiting, x, state)


def _as_block(sequence: nn.Sequential, name: str, module: nn.Module, x: Tensor) -> Block | Reason:
    """A child as a run has it, or why it must be called."""
    if not joins(module):
        return Reason("not_a_block", f"{name} is a {type(module).__name__}, no residual block that is fused")
    reason = wrapped(name, module) or module._refusal(x)
    if reason is not None:
        return Reason(reason.code, f"{name}: {reason.text}")
    if module.resfuse_state.backend != sequence.resfuse_state.backend:
        return Reason("backend", f"{name} was fused for another backend")
    block = module.plan.as_block(module, x)
    return Reason(block.code, f"{name}: {block.text}") if isinstance(block, Reason) else block


def _run(waiting: list[tuple[nn.Module, Block]], x: Tensor, state: State) -> Tensor:
    if not waiting:
        return x
    blocks, leanest = [block for _, block in waiting], state.memory == "leanest"
    try:
        found = functional.run(x, blocks, leanest=leanest, stats=_stats.take(x), backend=state.backend)
    except ArgumentError as error:  # nothing of these has run, but what was before them has
        state.split(Reason("argument", str(error)))
        for module, _ in waiting:
            x = module(x)
        return x
    return found if isinstance(found, Tensor) else _stats.leave(*found)


def forms(sequence: nn.Sequential) -> str:
    """What `report` says of it."""
    state, count = sequence.resfuse_state, sum(map(joins, sequence._modules.values()))
    if state.every >= count:
        return f"{count} blocks, {state.memory}"
    return f"{count} blocks, {state.memory}, outputs kept" + (f" every {state.every}" if state.every > 1 else "")
