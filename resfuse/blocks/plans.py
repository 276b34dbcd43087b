"""Which module classes have a fused form: matched by exact qualified name, their libraries never imported here.

A plan is a module of this package with `refusal(block)`, `convs(block)`, `run(block, x, backend)` and `forms(block)`.
"""

from __future__ import annotations

from types import ModuleType

from . import basic_block, bottleneck
from .mixin import qualified_name

PLANS: dict[str, ModuleType] = {plan.TORCHVISION: plan for plan in (basic_block, bottleneck)}


def plan_for(cls: type) -> ModuleType | None:
    return PLANS.get(qualified_name(cls))
