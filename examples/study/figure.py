"""The figure of a study: a panel for each experiment, two for the lesions."""

from __future__ import annotations

from pathlib import Path

COLOURS = {"plain": "#e0a458", "residual": "#2a6f97"}
OTHER = "#6b705c"


def plot(experiments: dict, title: str, path: Path) -> None:
    """Write a PNG of `experiments` as they stand in the JSON."""
    from matplotlib.figure import Figure  # no global state, no display

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    axes = figure.subplots(2, 3).flat
    lesion = experiments["lesion"]
    _depth(axes[0], experiments["depth"]["networks"])
    _single(axes[1], lesion)
    _reordered(axes[2], lesion["reordered"])
    _paths(axes[3], experiments["paths"])
    _many(axes[4], experiments["stochastic_depth"]["many"], lesion["many"]["plain layer"])
    _correlation(axes[5], experiments["gradient_correlation"]["networks"])
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=7, frameon=False)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _depth(panel, networks: dict) -> None:
    for kind, rows in networks.items():
        for index, row in enumerate(rows):
            losses, window = row["losses"], max(len(row["losses"]) // 20, 1)
            smooth = [sum(losses[i : i + window]) / window for i in range(len(losses) - window + 1)]
            panel.plot(
                range(window, len(losses) + 1), smooth, color=COLOURS[kind], linewidth=1.2,
                alpha=0.3 + 0.7 * index / max(len(rows) - 1, 1), label=f"{kind}, {2 * row['blocks']} layers",
            )
    panel.set(title="1. depth", xlabel="step", ylabel="training loss", yscale="log")


def _single(panel, lesion: dict) -> None:
    for name, marker in (("residual block", "o"), ("plain layer", "s")):
        errors = lesion["single"][name]
        places = [i / max(len(errors) - 1, 1) for i in range(len(errors))]
        colour = COLOURS[name.split()[0]]
        panel.plot(places, errors, marker, color=colour, label=f"one {name} of {len(errors)} deleted")
        panel.axhline(lesion["intact"][name], color=colour, linewidth=0.8, linestyle=":")
    panel.set(title="2. lesions", xlabel="place in the network (dotted: intact)", ylabel="test error")


def _reordered(panel, rows: list[dict]) -> None:
    taus, errors = [row["kendall_tau"] for row in rows], [row["test_error"] for row in rows]
    panel.plot(taus, errors, "o", color=COLOURS["residual"], alpha=0.4, markersize=4, label="residual blocks swapped")
    panel.set(title="2. reordering", xlabel="Kendall's tau of the order", ylabel="test error")
    panel.invert_xaxis()


def _paths(panel, found: dict) -> None:
    lengths = range(len(found["share_of_paths"]))
    panel.bar(lengths, found["share_of_paths"], color=OTHER, alpha=0.4, label="of all paths")
    panel.bar(lengths, found["share_of_gradient"], 0.4, color=COLOURS["residual"], label="of the gradient")
    panel.set(title="3. paths", xlabel="blocks gone through", ylabel="share")


def _many(panel, curves: dict, plain: dict) -> None:
    for name, curve, kind, style in (
        ("residual, normal", curves["normal"], "residual", "-o"),
        ("residual, stochastic depth", curves["stochastic depth"], "residual", "--o"),
        ("plain", plain, "plain", "-s"),
    ):
        shares = [count / curve["counts"][-1] for count in curve["counts"]]
        panel.plot(shares, curve["errors"], style, color=COLOURS[kind], markersize=3, label=name)
    panel.set(title="2. and 4. many deleted", xlabel="share of blocks or layers deleted", ylabel="mean test error")


def _correlation(panel, networks: dict) -> None:
    for kind, rows in networks.items():
        layers = [2 * row["blocks"] for row in rows]
        for lag, style in ((0, "-"), (3, ":")):
            values = [row["correlation"][lag] for row in rows]
            label = f"{kind}, {'next point' if lag == 0 else '4 points on'}"
            panel.plot(layers, values, style, color=COLOURS[kind], marker="o", markersize=3, label=label)
    panel.set(title="5. gradients before training", xlabel="layers", ylabel="mean cosine", xscale="log")
    panel.set_xticks(layers, [str(count) for count in layers])
    panel.minorticks_off()
