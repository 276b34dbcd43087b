"""`python -m resfuse agree`: every convolutional model of a library with BatchNorm, fused, beside its eager twin."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from .. import convert
from ..testing.environment import environment
from .agreement import Agreement, agreement
from .coverage import build, detects, family, models, names
from .results import write_json

BATCH, SIDE = 2, 64  # the latter where the model takes it, else its own
KEYPOINTS = 17  # of a person, as torchvision's model has them
LARGEST = 200_000_000  # parameters; with gradients and a twin they take 32 bytes each
NOTHING = "nothing to fuse"
TOO_LARGE = "too large"  # those, and what the memory that there is (`ulimit -d`) does not hold


@dataclass(frozen=True)
class Row:
    """agreement: None where the model is not run, and `reason` says why; input_size as it was run."""

    model: str
    family: str
    parameters: int
    input_size: list[int]
    seconds: float
    agreement: dict | None
    reason: str = ""

    @property
    def agrees(self) -> bool:
        return self.agreement is not None and Agreement(**self.agreement).agrees


def row(library: str, name: str, model: nn.Module, size: tuple[int, ...]) -> Row:
    start, parameters = time.monotonic(), sum(p.numel() for p in model.parameters())
    found, reason, taken = None, "", [BATCH, *size[1:]]
    if not convert.explain(model, input_size=size).fused:
        reason = NOTHING
    elif parameters > LARGEST:
        reason = TOO_LARGE
    else:
        torch.manual_seed(0)
        model = build(library, name, meta=False)[0]
        others = _detected(model) if detects(model) else ()
        taken = _size(model, size)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = asdict(agreement(model, taken, *others))
        except Exception as error:  # which is what this is to find
            reason = TOO_LARGE if "can't allocate memory" in str(error) else f"{type(error).__name__}: {error}"
    return Row(name, family(model), parameters, list(taken), round(time.monotonic() - start, 1), found, reason)


def _detected(model: nn.Module) -> tuple[list[dict[str, torch.Tensor]]]:
    """What a detection model shall find, in images of SIDE pixels, to which it scales them then."""
    model.transform.min_size, model.transform.max_size = (SIDE,), SIDE
    targets = []
    for i in range(BATCH):
        box = torch.tensor([[4.0, 6.0, 40.0 + i, 50.0]], dtype=torch.float64)
        mask = torch.zeros(1, SIDE, SIDE, dtype=torch.uint8)
        mask[:, 6:50, 4 : 40 + i] = 1
        points = torch.tensor([10.0, 12.0, 1.0]).repeat(1, KEYPOINTS, 1)
        targets.append({"boxes": box, "labels": torch.tensor([1]), "masks": mask, "keypoints": points})
    return (targets,)


def _size(model: nn.Module, own: tuple[int, ...]) -> tuple[int, ...]:
    small = (BATCH, own[1], SIDE, SIDE)
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(small))
        return small
    except Exception:  # some have a fixed size
        return (BATCH, *own[1:])


def show(library: str, chosen: Sequence[str], out: Path | None, console: Console) -> bool:
    """Whether all that were run agree. A results file is added to: what it has is not run again."""
    found = load(out) if out is not None and out.exists() else []
    known = {each.model for each in found}
    for name, model, size in models(library, [name for name in chosen or names(library) if name not in known]):
        each = row(library, name, model, size)
        found.append(each)
        if out is not None:
            command = f"python -m resfuse agree --library {library} --json {out}"
            content = {"command": command, "environment": environment("cpu"), "library": library}
            write_json(out, {**content, "models": [asdict(row) for row in found]})
        if not each.agrees:
            console.print(f"{each.model}: {each.reason or each.agreement}", highlight=False)
    console.print(summary(found), highlight=False)
    return all(each.agrees for each in found if each.reason not in (NOTHING, TOO_LARGE))


def summary(found: Sequence[Row]) -> str:
    agree = sum(each.agrees for each in found)
    plain, large = (sum(each.reason == reason for each in found) for reason in (NOTHING, TOO_LARGE))
    rest = f"{plain} have nothing to fuse, {large} too large to run, {len(found) - agree - plain - large} do not agree"
    return f"{len(found)} models: {agree} agree, {rest}"


def load(path: Path) -> list[Row]:
    return [Row(**each) for each in json.loads(path.read_text())["models"]]
