"""`python -m resfuse coverage`: what `fuse` reaches of every model of a library; on the meta device, without data.

A model counts if it is a convolutional network with BatchNorm: half as many BatchNorms as convolutions, or more.
"""

from __future__ import annotations

import inspect
import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.overrides import TorchFunctionMode

from .. import convert
from ..testing.environment import environment
from .results import write_json

log = logging.getLogger("resfuse")
LIBRARIES = ("torchvision", "timm")
INITIALISERS = {getattr(torch.Tensor, f"{name}_") for name in "normal uniform erfinv mul add clamp fill zero".split()}
ENOUGH = 0.9  # of a model's convolution multiply-adds


@dataclass(frozen=True)
class Row:
    """coverage: share of convolution multiply-adds inside fused blocks at the model's own input size, of a detection
    model's backbone, since its heads' depend on what it sees, None where a forward on the meta device is not possible;
    others: classes that hold the other convolutions, and how many."""

    model: str
    family: str
    coverage: float | None
    blocks: int
    input_size: list[int]
    others: dict[str, int]


def names(library: str) -> list[str]:
    if library == "timm":
        import timm

        return timm.list_models()
    import torchvision

    return torchvision.models.list_models()


def build(library: str, name: str, meta: bool = True) -> tuple[nn.Module, tuple[int, ...]]:
    """The model, with meta without data where it can be made so, and an input's size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not meta:
            return _built(library, name)
        try:
            with torch.device("meta"), _WithoutValues():
                return _built(library, name)
        except (RuntimeError, TypeError):  # it looks at other values to find its own sizes
            return _built(library, name)


class _WithoutValues(TorchFunctionMode):
    """Initialisers do nothing, which on the meta device takes them most of the time; torch.linspace has values: blocks'
    rates of stochastic depth are read from it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in INITIALISERS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs | {"device": "cpu"} if func is torch.linspace else kwargs))


def _built(library: str, name: str) -> tuple[nn.Module, tuple[int, ...]]:
    if library == "timm":
        import timm

        model = timm.create_model(name)
        return model, (1, *model.default_cfg["input_size"])
    import torchvision

    builder = torchvision.models.get_model_builder(name)
    inputs, side = {}, 299 if name.endswith("inception_v3") else 224
    if name.endswith(("googlenet", "inception_v3")):
        inputs = {"init_weights": False}
    elif "weights_backbone" in inspect.signature(builder).parameters:  # which are downloaded if nothing is said
        inputs = {"weights_backbone": None}
    return builder(**inputs), (1, 3, side, side)


def counts(model: nn.Module) -> bool:
    """Whether it is one of those that this is about."""
    kinds = Counter(
        kind for module in model.modules() for kind in (nn.Conv2d, nn.BatchNorm2d) if isinstance(module, kind)
    )
    return kinds[nn.BatchNorm2d] > 0 and 2 * kinds[nn.BatchNorm2d] >= kinds[nn.Conv2d]


def models(library: str, chosen: Sequence[str]) -> Iterator[tuple[str, nn.Module, tuple[int, ...]]]:
    """Name, model without data, and an input's size, of those chosen that count."""
    for name in track(chosen, description=library, transient=True):
        try:
            model, size = build(library, name)
        except Exception as error:  # the library's own, or what it wants installed
            log.warning("%s cannot be built: %s", name, error)
            continue
        if counts(model):
            yield name, model, size


def row(name: str, model: nn.Module, size: tuple[int, ...]) -> Row:
    found = convert.explain(model, input_size=size)
    modules = dict(model.named_modules())
    owners = (fqn.rpartition(".")[0] if code == "no_plan" else fqn for fqn, code, _ in found.skipped)
    others = Counter(type(modules[fqn]).__name__ for fqn in owners)
    counted = convert.explain(model.backbone, input_size=size) if detects(model) else found
    return Row(name, family(model), counted.coverage, len(found.fused), list(size), dict(others.most_common(4)))


def family(model: nn.Module) -> str:
    """The library's module: resnet, or segmentation.fcn."""
    return type(model).__module__.partition(".models.")[2]


def detects(model: nn.Module) -> bool:
    return family(model).startswith("detection.")


def show(library: str, chosen: Sequence[str], out: Path | None, console: Console) -> None:
    found = [row(*each) for each in models(library, chosen or names(library))]
    if out is not None:
        facts, command = environment("cpu"), f"python -m resfuse coverage --library {library} --json {out}"
        content = {"command": command, "environment": facts, "library": library}
        write_json(out, {**content, "models": [asdict(each) for each in found]})
    table = Table(title=f"Share of convolution multiply-adds in fused blocks, {library}", title_justify="left")
    for column in ("model", "fused", "blocks", "others"):
        table.add_column(column, justify="right" if column in ("fused", "blocks") else "left")
    for each in found:
        others = ", ".join(f"{count} in {name}" for name, count in each.others.items())
        table.add_row(each.model, share(each.coverage), str(each.blocks), others)
    console.print(table)
    console.print(summary(found), highlight=False)


def summary(found: Sequence[Row]) -> str:
    enough = sum((each.coverage or 0) >= ENOUGH for each in found)
    some = sum(each.blocks > 0 for each in found)
    return f"{len(found)} convolutional models with BatchNorm: {some} have fused blocks, {enough} at least {ENOUGH:.0%}"


def families(results: dict) -> list[str]:
    """docs/models.md's table: a line for each family of a results file."""
    lines = ["| family | models | with 90 % or more | median share | the rest is in |", "|---|---|---|---|---|"]
    for family in sorted({each["family"] for each in results["models"]}):
        its = [each for each in results["models"] if each["family"] == family]
        shares = sorted(each["coverage"] or 0 for each in its)
        enough, median = sum(s >= ENOUGH for s in shares), share(shares[len(shares) // 2])
        rest = ", ".join(name for name, _ in Counter(name for each in its for name in each["others"]).most_common(3))
        lines.append(f"| {family} | {len(its)} | {enough} | {median} | {rest} |")
    return lines


def share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0%}"


def load(path: Path) -> list[Row]:
    return [Row(**each) for each in json.loads(path.read_text())["models"]]
