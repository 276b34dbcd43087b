"""Each primitive of the kernel sets at the shapes of a bottleneck: its time, and what share of the device's ceilings,
measured in the same run, its bytes and operations come to.

`make gpu` measures; python -m benchmarks.primitives FILE prints docs/gpu.md's table of what it wrote.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import resfuse
from resfuse.kernels import dispatch
from resfuse.kernels.interface import (
    Activation,
    Affine,
    BNContext,
    BNGrad,
    Geometry,
    Masked,
    Norm,
    Stats,
    Sum,
    Summed,
    Want,
)
from resfuse.testing.cases import BottleneckCase, make_block, make_gradient, make_input
from resfuse.testing.timing import interleave, summary
from resfuse.testing.tolerances import relative_error

BY_ROWS = ("conv_stats", "expand", "expand_dgrad", "conv_backward")
POINTWISE, WINDOW = Geometry((1, 1), (0, 0), (1, 1), 1), Geometry((1, 1), (1, 1), (1, 1), 1)


class Work(NamedTuple):
    """call(kernels); bytes of its operands and results, each once; multiplications and additions of its products."""

    call: Callable[[SimpleNamespace], object]
    bytes: int
    operations: int


def sets(device: torch.device, dtype: torch.dtype) -> dict[str, SimpleNamespace]:
    """The kernel sets that run every primitive there; on a CPU the automatic choice beside the oracle."""
    names = [name for name in dispatch.ORDER if not dispatch.missing(name, device.type, dtype)]
    names += ["auto"] if device.type == "cpu" else []
    return {name: dispatch.kernels(name, device.type, dtype) for name in names}


def parts(device: torch.device, dtype: torch.dtype) -> dict[str, SimpleNamespace]:
    """The sets that run some primitives on a GPU; on a CPU the automatic choice has them."""
    found = {}
    for name in dispatch.ORDER if device.type == "cuda" else ():
        chosen = dispatch.kernel_set(name)
        if not chosen.unsupported(device.type, dtype) and dispatch.missing(name, device.type, dtype):
            modules = {p: importlib.import_module(f"{chosen.__name__}.{p}") for p in chosen.PRIMITIVES}
            found[name] = SimpleNamespace(**{p: getattr(module, p) for p, module in modules.items()})
    return found


def with_windows(k: SimpleNamespace) -> SimpleNamespace:
    """The Triton set with its own convolutions in place of the vendor's."""
    from resfuse.kernels.triton import _table

    def patched(function: Callable) -> Callable:
        def call(*args):
            before, _table.ours = _table.ours, lambda *_: True
            try:
                return function(*args)
            finally:
                _table.ours = before

        return call

    return SimpleNamespace(conv_stats=patched(k.conv_stats), conv_backward=patched(k.conv_backward))


@contextmanager
def _warpgroups(asked: str) -> Iterator[None]:
    os.environ["RESFUSE_WGMMA"] = asked
    try:
        yield
    finally:
        del os.environ["RESFUSE_WGMMA"]


def with_warpgroups(k: SimpleNamespace, asked: str) -> SimpleNamespace:
    """The CUDA set with all its products by rows by Hopper's warpgroups ("1") or by warps ("0")."""
    return SimpleNamespace(**{name: _warpgroups(asked)(getattr(k, name)) for name in BY_ROWS})


def ceilings(device: torch.device, dtype: torch.dtype, size: int, side: int) -> dict[str, Callable[[], object]]:
    """A copy of `size` bytes and a square product."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}


def works(case: BottleneckCase, dtype: torch.dtype, device: torch.device) -> dict[str, Work]:
    """The primitives of one identity bottleneck's training step."""
    generator = torch.Generator(device).manual_seed(0)
    n, wide, h, w = case.input_shape
    narrow, count = case.width, case.rows

    def image(channels: int) -> Tensor:
        t = torch.randn(n, h, w, channels, generator=generator, device=device)
        return t.to(dtype).permute(0, 3, 1, 2)

    def vector(channels: int) -> Tensor:
        return torch.rand(channels, generator=generator, device=device) + 0.5

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator, device=device) / columns**0.5).to(dtype)

    x, z1, z2, dout, dy = image(wide), image(narrow), image(narrow), image(wide), image(narrow)
    w1, w3, wg = matrix(narrow, wide), matrix(wide, narrow), matrix(wide, narrow)
    mean, var, scale, shift = (vector(narrow) for _ in range(4))
    mask = torch.randint(0, 256, (count, wide // 8), generator=generator, device=device, dtype=torch.uint8)
    y1, y2, g = Norm(z1, scale, shift), Norm(z2, scale, shift), Masked(dout, mask)
    dz1 = BNGrad(dy, z1, mean, scale, mean / 100, var / 100, shift)
    affine = Affine(vector(wide), vector(wide), vector(wide))
    cov = torch.eye(narrow, device=device) + 0.1
    products, sums = torch.randn(wide, narrow, generator=generator, device=device), vector(wide)
    q, one, c = matrix(narrow, narrow), torch.ones((), device=device), vector(narrow)
    one_wide, filters = count * wide * narrow * 2, w1[:, :, None, None]
    square = matrix(narrow, 9 * narrow).view(narrow, narrow, 3, 3)
    activated, context = y2._replace(act=Activation("silu")), BNContext(mean, var, y2.scale / var, True)
    big, small, bits = x.nbytes, z1.nbytes, mask.nbytes
    return {
        "conv_stats": Work(lambda k: k.conv_stats(x, filters, POINTWISE, True), big + small, one_wide),
        "bn_stats": Work(lambda k: k.bn_stats(z2), small, 0),
        "covariance": Work(lambda k: k.covariance(y2), small, 2 * count * narrow**2),
        "expand": Work(
            lambda k: k.expand(y2, w3, affine.scale, affine.shift, Sum(x), Want(mask=True)),
            2 * big + small + bits, one_wide,
        ),
        "apply": Work(lambda k: k.apply(y1, Sum(), Want()).out, 2 * small, 0),
        "expand_products": Work(
            lambda k: k.expand_products(g, y2, mean, None)[:2], big + bits + small, one_wide
        ),
        "expand_products, with u": Work(  # where the set gives it
            lambda k: k.expand_products(g, y2, mean, wg)[:2], big + bits + 2 * small, 2 * one_wide
        ),
        "expand_dgrad": Work(
            lambda k: _gradient(k.expand_dgrad(g, None, y2, wg, q, one, c, True, mean)),
            big + bits + 2 * small, one_wide + 2 * count * narrow**2,
        ),
        "bn_reduce": Work(lambda k: k.bn_reduce(dy, z2, mean, var), 2 * small, 0),
        "bn_act, silu": Work(lambda k: k.bn_act(activated), 2 * small, 0),
        "bn_act_backward, silu": Work(lambda k: k.bn_act_backward(dy, activated, context), 5 * small, 0),
        "bn_dgrad": Work(lambda k: k.bn_dgrad(dz1), 3 * small, 0),
        "conv_backward, input": Work(
            lambda k: k.conv_backward(dz1, x, filters, POINTWISE, g, (True, False))[0],
            2 * big + bits + 2 * small, one_wide,
        ),
        "conv_backward, weight": Work(
            lambda k: k.conv_backward(dz1, x, filters, POINTWISE, None, (False, True))[1], big + 2 * small, one_wide
        ),
        "3x3 conv_stats": Work(
            lambda k: k.conv_stats(y1, square, WINDOW, True), 2 * small, 18 * count * narrow**2
        ),
        "3x3 conv_backward, input": Work(
            lambda k: k.conv_backward(dz1, y2, square, WINDOW, None, (True, False))[0],
            4 * small, 18 * count * narrow**2,
        ),
        "3x3 conv_backward, weight": Work(
            lambda k: k.conv_backward(dz1, y2, square, WINDOW, None, (False, True))[1],
            3 * small, 18 * count * narrow**2,
        ),
        "finalize": Work(lambda k: k.finalize(Stats(mean, var), scale, shift, 1e-5), 0, 0),
        "expand_stats": Work(lambda k: k.expand_stats(w3, mean, cov), 0, 2 * wide * narrow**2),
        "expand_coefficients": Work(
            lambda k: k.expand_coefficients(products, sums, w3, wg, mean, cov, affine, count), 0,
            4 * wide * narrow**2,
        ),
    }  # fmt: skip


def measure(
    case: BottleneckCase, dtype: torch.dtype, device: torch.device, seconds: float, size: int, side: int
) -> list[dict]:
    """A row for each primitive and set: error against the eager set, time, rates, shares of the ceilings."""
    kernels, rows = sets(device, dtype), []
    rounds = {"budget": seconds, "maximum": 50, "warmup": 3, "device": device, "host": False}
    limits = {name: summary(each).median for name, each in
              interleave(ceilings(device, dtype, size, side), **rounds).items()}
    copy, matmul = 2 * size / limits["copy"], 2 * side**3 / limits["matmul"]
    for name, work in works(case, dtype, device).items():
        exact = list(_tensors(work.call(kernels["eager"])))
        errors, candidates = {}, dict(kernels)
        primitive = name.removeprefix("3x3 ").partition(",")[0]
        candidates |= {chosen: k for chosen, k in parts(device, dtype).items() if hasattr(k, primitive)}
        if "3x3" in name and "triton" in kernels:
            candidates["triton, own windows"] = with_windows(kernels["triton"])
        if primitive in BY_ROWS and not name.startswith("3x3") and not name.endswith("weight") and "cuda" in kernels:
            for by, asked in (("warpgroups", "1"), ("warps", "0")):
                candidates[f"cuda, {by}"] = with_warpgroups(kernels["cuda"], asked)
        for chosen, k in candidates.items():
            found = zip(_tensors(work.call(k)), exact, strict=True)
            errors[chosen] = max(relative_error(ours, theirs) for ours, theirs in found)
        times = interleave({chosen: lambda k=k: work.call(k) for chosen, k in candidates.items()}, **rounds)  # noqa: B023
        for chosen, each in times.items():
            middle, low, high, count = summary(each)
            row = {
                "case": case.name, "dtype": str(dtype).removeprefix("torch."), "batch": case.batch,
                "primitive": name, "set": chosen, "error": errors[chosen], "median": middle, "low": low,
                "high": high, "rounds": count, "bytes": work.bytes, "operations": work.operations,
            }  # fmt: skip
            if work.bytes:
                row |= {"copy_share": work.bytes / middle / copy}
            if work.operations:
                row |= {"matmul_share": work.operations / middle / matmul}
            rows.append(row)
    return rows


def host(case: BottleneckCase, dtype: torch.dtype, device: torch.device, steps: int) -> list[dict]:
    """Seconds that the host takes to issue a block's forward and backward, nothing waited for: medians of `steps`."""
    rows = []
    for chosen in sets(device, dtype):
        config = resfuse.FuseConfig(backend=chosen)
        block = resfuse.fuse(make_block(case, device=device), config=config)
        x, dout = (make(case, dtype, device=device) for make in (make_input, make_gradient))
        x.requires_grad_()
        times: list[list[float]] = [[], []]
        for _ in range(steps + 2):
            began = time.perf_counter()
            with torch.autocast(device.type, dtype=dtype):
                out = block(x)
            between = time.perf_counter()
            out.backward(dout)
            times[0].append(between - began)
            times[1].append(time.perf_counter() - between)
            if device.type == "cuda":
                torch.cuda.synchronize()
        forward, backward = (median(each[2:]) for each in times)
        rows.append({"case": case.name, "set": chosen, "forward": forward, "backward": backward, "steps": steps})
    return rows


def _gradient(found: Tensor | Summed) -> Tensor:
    return found.dy if isinstance(found, Summed) else found


def _tensors(result) -> list[Tensor]:
    """The results that every set gives: u and prepared recipes are a set's own choice."""
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() else []
    return [t for part in result or () for t in _tensors(part)]


def show(rows: list[dict], issued: list[dict], console: Console) -> None:
    table = Table(title="Primitives, and what share of a copy's and a matrix product's rate they reach",
                  title_justify="left")
    for column in ("case", "primitive", "set", "us", "triton's", "error", "copy", "matmul"):
        table.add_column(column, justify="left" if column in ("case", "primitive", "set") else "right")
    triton = {(row["case"], row["primitive"]): row["median"] for row in rows if row["set"] == "triton"}
    for row in rows:
        theirs = triton.get((row["case"], row["primitive"]))
        ratio = "-" if theirs is None else f"{theirs / row['median']:.2f}x"
        shares = (f"{row[key]:.0%}" if key in row else "-" for key in ("copy_share", "matmul_share"))
        microseconds, error = f"{1e6 * row['median']:.1f}", f"{row['error']:.1e}"
        table.add_row(row["case"], row["primitive"], row["set"], microseconds, ratio, error, *shares)
    console.print(table)
    for row in issued:
        console.print(
            f"{row['case']}, {row['set']}: the host issues forward in {1e6 * row['forward']:.0f} us, backward in "
            f"{1e6 * row['backward']:.0f} us", highlight=False,
        )


def table(results: dict, sets: tuple[str, ...] = ("triton", "cuda")) -> list[str]:
    """Lines of Markdown: for each primitive and case microseconds and share of a copy's rate, the sets side by side."""
    rows = [row for row in results["rows"] if row["set"] in sets and "3x3" not in row["primitive"]]
    rows = [row for row in rows if "with u" not in row["primitive"] or row["set"] != "triton"]  # which leaves u out
    cases = list(dict.fromkeys(row["case"] for row in rows))
    lines = [f"| {' / '.join(sets)} | {' | '.join(cases)} |", "|---" * (1 + len(cases)) + "|"]
    for primitive in dict.fromkeys(row["primitive"] for row in rows):
        cells = []
        for case in cases:
            found = {row["set"]: row for row in rows if (row["primitive"], row["case"]) == (primitive, case)}
            times = " / ".join(f"{1e6 * found[name]['median']:.0f}" for name in sets if name in found)
            share = max(row.get("copy_share", 0) for row in found.values())
            cells.append(f"{times} ({share:.0%})" if share else times)
        name, comma, rest = primitive.partition(",")
        lines.append(f"| `{name}`{comma}{rest} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table(json.loads(Path(sys.argv[1]).read_text()))))
