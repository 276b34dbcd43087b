"""The figure of a roofline's results: each primitive under the device's roof, and the bytes of each block."""

from __future__ import annotations

from pathlib import Path

from .plot import COLOURS

FUSED_COLOUR = "#e0a458"


def plot(content: dict, path: Path) -> None:
    """Write a PNG: the roofline chart above, stacked bars of bytes by block and implementation below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 10), layout="constrained")
    chart, bars = figure.subplots(2, 1)
    _chart(chart, content)
    _bars(bars, content)
    limits = content["ceilings"]
    figure.suptitle(
        f"{content['model']}, batch {content['batch']}, {content['dtype']}, counted; ceilings: {limits['source']}",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _chart(axes, content: dict) -> None:
    """Operations for a byte against the rate that the device allows for them; area by share of the floor."""
    bandwidth, rate = content["ceilings"]["bandwidth"], content["ceilings"]["rate"]
    ridge = rate / bandwidth
    axes.plot([ridge / 30, ridge, 8 * ridge], [bandwidth * ridge / 30, rate, rate], color="black", linewidth=1)
    for name, colour in (("eager", COLOURS["eager"]), ("resfuse", COLOURS["resfuse"])):
        whole = content["totals"][name]["floor_ms"]
        products = {k: t for k, t in content["kernels"][name].items() if t["teraflop"] > 0}
        intensity = [1e3 * t["teraflop"] / t["gigabytes"] for t in products.values()]
        reached = [1e15 * t["teraflop"] / t["floor_ms"] for t in products.values()]
        sizes = [2000 * t["floor_ms"] / whole for t in products.values()]
        axes.scatter(intensity, reached, sizes, color=colour, alpha=0.6, label=name)
        for label, x, y, size in zip(products, intensity, reached, sizes, strict=True) if name == "resfuse" else ():
            if size > 20:  # a hundredth of the step
                axes.annotate(label, (x, y), fontsize=7, xytext=(12, -12), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="operations for a byte moved",
             ylabel="operations a second at the floor")
    axes.set_title("Products: sums over a step, so those of several shapes lie below the roof", fontsize=9)
    axes.legend(frameon=False, fontsize=8, markerscale=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _bars(axes, content: dict) -> None:
    blocks, names = list(content["blocks"]["eager"]), list(content["blocks"])
    for index, name in enumerate(names):
        colour = {**COLOURS, "pointwise fusion": FUSED_COLOUR}[name]
        places = [i + 0.27 * (index - 1) for i in range(len(blocks))]
        found = [content["blocks"][name].get(block) for block in blocks]
        least = [t["least_gigabytes"] if t else 0.0 for t in found]
        rest = [t["gigabytes"] - t["least_gigabytes"] if t else 0.0 for t in found]
        axes.bar(places, least, 0.25, color=colour, label=name)
        if any(rest):
            axes.bar(places, rest, 0.25, bottom=least, color=colour, alpha=0.4,
                     label=f"{name}: copies that its kernels make for themselves")
    axes.set_xticks(range(len(blocks)), blocks, fontsize=8, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_ylabel("GB moved, forward and backward")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
