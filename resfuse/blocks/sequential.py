"""nn.Sequential, and torchvision's wrapper: convolutions in a row, each with its BatchNorm and activation."""

from __future__ import annotations

from torch import Tensor, nn

from ..kernels.interface import Reason
from . import _segments
from ._segments import Step
from .mixin import SOME, norm_kind

ORIGINALS = _segments.CONTAINERS
LISTS = False
OWNS = SOME


def find(block: nn.Sequential) -> list[nn.Module | list[Step]]:
    """Its children in order, a list of steps for each row of convolutions."""
    found: list[nn.Module | list[Step]] = []
    children = list(block._modules.values())
    while children:
        step = _step(children)
        if step is None:
            found.append(children.pop(0))
            continue
        if not (found and isinstance(found[-1], list)):
            found.append([])
        found[-1].append(step)
        del children[: 3 if step.after and step.after[-1] is children[2] else 2]
    return found


def _step(children: list[nn.Module]) -> Step | None:
    """What the children begin with, if that is a convolution and its BatchNorm, and an activation that the kernels have
    or none."""
    if len(children) < 2 or not isinstance(children[0], nn.Conv2d) or norm_kind(type(children[1])) is None:
        return None
    return _segments.step(*children[:2], *filter(_segments.is_fused, children[2:3]))


def applies(block: nn.Sequential) -> bool:
    """Whether there is anything to fuse."""
    return any(isinstance(part, list) for part in find(block))


def refusal(block: nn.Sequential) -> Reason | None:
    """Why the block, as it is now, must run its original forward."""
    steps = _steps(block)
    return _segments.refusal(block, steps) if steps else Reason("children", "there is no convolution with a BatchNorm")


def owned(block: nn.Sequential) -> list[nn.Module]:
    return list(_segments.bypassed(_steps(block)))


def watched(block: nn.Sequential) -> list[nn.Module]:
    """Everything that `find` looks at."""
    children = list(block._modules.values())
    return [*children, *(inner for child in children if norm_kind(type(child)) for inner in child._modules.values())]


def run(block: nn.Sequential, x: Tensor, backend: str) -> Tensor:
    parts = find(block)
    _segments.check_proven((step for part in parts if isinstance(part, list) for step in part), x, backend)
    for part in parts:
        x = _segments.run(_segments.segments(part), x, block) if isinstance(part, list) else part(x)
    return x


def forms(block: nn.Sequential) -> str:
    chains = [segment for part in find(block) if isinstance(part, list) for segment in _segments.segments(part)]
    return " + ".join(f"{len(chain.pairs)} in a row" for chain in chains)


def _steps(block: nn.Sequential) -> list[Step]:
    return [step for part in find(block) if isinstance(part, list) for step in part]
