"""What is compared: a name, and how a model is prepared for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

import resfuse
from resfuse.kernels import dispatch


@dataclass(frozen=True)
class Implementation:
    """prepare(model) -> model: given a copy of its own in `memory_format`, which it may change in place."""

    name: str
    prepare: Callable[[nn.Module], nn.Module]
    memory_format: torch.memory_format = torch.channels_last
    compiled: bool = False

    @property
    def layout(self) -> str:
        return "channels_last" if self.memory_format == torch.channels_last else "NCHW"


EAGER = Implementation("eager", lambda model: model)
EAGER_NCHW = Implementation("eager NCHW", lambda model: model, torch.contiguous_format)
COMPILE = Implementation("torch.compile", torch.compile, compiled=True)
# Without CUDA graphs: their private pools would hide the memory that is compared.
AUTOTUNE = Implementation(
    "torch.compile max-autotune", partial(torch.compile, mode="max-autotune-no-cudagraphs"), compiled=True
)
RESFUSE = Implementation("resfuse", resfuse.fuse)
IMPLEMENTATIONS = {each.name: each for each in (EAGER, EAGER_NCHW, COMPILE, AUTOTUNE, RESFUSE)}
BASELINES = (EAGER.name, EAGER_NCHW.name)


def kernel_sets(device: torch.device | str, dtype: torch.dtype) -> list[Implementation]:
    """resfuse with each kernel set that alone can run whole blocks, besides the automatic choice."""
    kind = torch.device(device).type
    return [
        Implementation(f"resfuse {name}", partial(resfuse.fuse, config=resfuse.FuseConfig(backend=name)))
        for name in dispatch.ORDER
        if not dispatch.missing(name, kind, dtype) and set(choice(device, dtype).values()) != {name}
    ]


def choice(device: torch.device | str, dtype: torch.dtype) -> dict[str, str]:
    """The kernel set that serves each primitive there under backend="auto"."""
    return dict(dispatch.kernels("auto", torch.device(device).type, dtype).chosen)
