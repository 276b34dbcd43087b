"""Which module classes have a fused form: matched by exact qualified name, their libraries never imported here.

A plan is a module of this package with
    ORIGINALS               the qualified names of the classes
    LISTS                   whether its input may be a list of tensors
    OWNS                    the children that it runs itself, None for all; SOME: owned(block) lists the modules, and
                            watched(block) all that decide; the others are surveyed as ever
    refusal(block)          why the block must run its original forward, or None
    run(block, x, backend)  the fused forward
    forms(block)            what `explain` says of it
    as_block(block, x)      where a run may hold it: its `functional.Block`, or why not; draws what a call draws
    stem_ends(block)        where it is a stem: the names of its convolution and of its last module
    applies(block)          where not every block of the classes is meant: whether this one is
    METHOD                  "forward_features" where that is what is replaced
and, where a class has a name of its own, as attributes of the originals' names, the fused classes.
"""

from __future__ import annotations

from types import ModuleType

from torch import nn

from . import (
    bn_relu,
    bottle2neck,
    chain,
    conv_bn_relu,
    described,
    dla_root,
    features,
    layer_getter,
    preactivated,
    residual_block,
    resnet,
    sequential,
    split_attention,
    stem,
)  # fmt: skip
from .descriptions import BlockDescription, Part
from .mixin import FusedMixin, qualified_name

PLANS: dict[str, ModuleType] = {
    original: plan
    for plan in (
        bn_relu, bottle2neck, chain, conv_bn_relu, described, dla_root, features, layer_getter, preactivated,
        residual_block, resnet, sequential, split_attention, stem,
    )
    for original in plan.ORIGINALS
}


def register_block(block: type[nn.Module] | str, description: BlockDescription) -> None:
    """Give a class of blocks a fused form: `fuse` knows it from then on.

    block: the class, or its qualified name, for which nothing is imported; exactly this class is meant, not subclasses.
    Raises ValueError where it has another fused form already, TypeError for arguments of other types.
    """
    if not (isinstance(block, str) or (isinstance(block, type) and issubclass(block, nn.Module))):
        raise TypeError(f"block must be a class of torch.nn.Module or its qualified name, got {block!r}")
    if not isinstance(description, BlockDescription):
        raise TypeError(f"description must be a resfuse.BlockDescription, got {type(description).__name__}")
    parts = description.parts
    if not (parts or description.row) or not all(isinstance(part, Part) for part in parts):
        raise TypeError("description.parts must be one resfuse.Part or more, or description.row a name")
    name = block if isinstance(block, str) else qualified_name(block)
    if PLANS.get(name, described) is not described or described.BLOCKS.get(name, description) != description:
        raise ValueError(f"{name} has a fused form already")
    described.BLOCKS[name], PLANS[name] = description, described


def plan_of(module: nn.Module) -> ModuleType | None:
    """The plan that a module has, or would have if it were fused."""
    plan = module.plan if isinstance(module, FusedMixin) else plan_for(type(module))
    return None if plan is not None and hasattr(plan, "applies") and not plan.applies(module) else plan


def plan_for(cls: type) -> ModuleType | None:
    return PLANS.get(qualified_name(cls))
