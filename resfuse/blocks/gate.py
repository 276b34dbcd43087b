"""A plan's refusal, asked again only when something that it may depend on has changed.

What a plan finds out about a block is decided by the block's and its inner modules' classes, attributes and children,
by there being no hooks on inner modules, and by the classes of their parameters. `record` notes all of it, and
`csrc/gate.cpp` compares it with the block as it is, object by object, at every call. Values of tensors and parameters
themselves may change: nobody's refusal looks at them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

from torch import nn

from .. import _native

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
STATE = "_resfuse_state"  # holds the record, and is none of its business


@cache
def comparison() -> Callable | None:
    """unchanged(record, block, accepted classes of parameters), None where it was not built."""
    module = _native.module()
    return module and module.unchanged


def record(block: nn.Module, inner: Iterable[nn.Module]) -> tuple:
    """inner: the modules whose forward the plan stands for. Nothing in it refers to the block."""
    rows = []
    for module in inner:
        held = module.__dict__
        rows.append((module, _described(module), tuple(held[name] for name in HOOKS), held["_parameters"]))
    return _described(block), tuple(rows)


def _described(module: nn.Module) -> tuple:
    held, children = module.__dict__, module._modules
    values = tuple(... if name == STATE else value for name, value in held.items())
    return type(module), tuple(held), values, children, tuple(children), tuple(children.values())
