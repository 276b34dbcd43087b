"""Which module classes have a fused form: matched by exact qualified name, their libraries never imported here.

A plan is a module of this package with
    ORIGINALS               the qualified names of the classes
    LISTS                   whether its input may be a list of tensors
    OWNS                    the children that it runs itself, None for all; the others are surveyed as ever
    refusal(block)          why the block must run its original forward, or None
    run(block, x, backend)  the fused forward
    forms(block)            what `explain` says of it
and, as attributes of the originals' names, the fused classes.
"""

from __future__ import annotations

from types import ModuleType

from . import bn_relu, chain, conv_bn_relu, dense_layer, residual_block, resnet, stem, transition
from .mixin import qualified_name

PLANS: dict[str, ModuleType] = {
    original: plan
    for plan in (bn_relu, chain, conv_bn_relu, dense_layer, residual_block, resnet, stem, transition)
    for original in plan.ORIGINALS
}


def plan_for(cls: type) -> ModuleType | None:
    return PLANS.get(qualified_name(cls))
