"""The figure of a results file: memory kept for backward, and speed."""

from __future__ import annotations

from pathlib import Path

BASELINES = ("eager", "eager NCHW")
COLOURS = {"eager": "#9aa5b1", "torch.compile": "#e0a458", "resfuse": "#2a6f97"}
OTHER = "#6b705c"
SHOWN = "forward+backward", "inference_mode"


def plot(results: dict, path: str | Path) -> None:
    """Write a PNG: saved bytes relative to eager above, forward+backward speed-ups with their intervals below."""
    from matplotlib.figure import Figure  # no global state, no display

    shares, speeds = _memory(results["memory"]), _speed(results["times"])
    width = max(11.0, 0.45 * max(len(shares), len(speeds)))
    figure = Figure(figsize=(width, 8), layout="constrained")
    memory, speed = figure.subplots(2, 1)
    _bars(memory, shares, "kept for backward\n(eager = 1)", 0.0)
    _bars(speed, speeds, "forward + backward, or evaluation\n(times faster than eager)", 1.0)
    if _spans_decades(speeds):
        speed.set_yscale("log")
        speed.yaxis.set_major_formatter("{x:g}")
    memory.set_ylim(top=1.25)
    drawn = {bars.get_label(): bars for axes in (memory, speed) for bars in axes.containers if hasattr(bars, "patches")}
    figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=len(drawn), frameon=False, fontsize=9)
    facts = results["environment"]
    figure.suptitle(
        f"{facts['device']}, torch {facts['versions']['torch']}, commit {facts['commit'] or 'unknown'}", fontsize=10
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _memory(rows: list[dict]) -> dict[str, dict[str, tuple]]:
    """Group: implementation: (share of eager, None). At the largest batch each pair of subject and mode has."""
    found: dict[str, dict[str, tuple]] = {}
    for mode, subject in dict.fromkeys((row["mode"], row["subject"]) for row in rows):
        own = [row for row in rows if (row["mode"], row["subject"]) == (mode, subject)]
        batch = max(row["batch"] for row in own)
        own = {row["implementation"]: row["saved_bytes"] for row in own if row["batch"] == batch}
        found[f"{subject}, {_short(mode)}, b{batch}"] = {
            name: (size / own["eager"], None) for name, size in own.items() if name != "eager NCHW"
        }
    return found


def _speed(rows: list[dict]) -> dict[str, dict[str, tuple]]:
    """Group: implementation: (median ratio, (low, high))."""
    found: dict[str, dict[str, tuple]] = {}
    for row in rows:
        ours_or_peer = row["implementation"] not in BASELINES
        if row["passes"] in SHOWN and row["speedup"] and ours_or_peer:
            ratio = row["speedup"]
            group = found.setdefault(f"{row['subject']}, {_short(row['mode'])}, b{row['batch']}", {})
            group[row["implementation"]] = (ratio["median"], (ratio["low"], ratio["high"]))
    return found


def _spans_decades(speeds: dict[str, dict[str, tuple]]) -> bool:
    medians = [median for group in speeds.values() for median, _ in group.values()]
    return bool(medians) and max(medians) > 5 * min(medians)


def _bars(axes, groups: dict[str, dict[str, tuple]], label: str, base: float) -> None:
    """A group of bars for each key, from `base` to their values, each as wide as if every group had them all."""
    names = sorted({name for group in groups.values() for name in group}, key=_order)
    width = 0.8 / max(len(names), 1)
    for index, name in enumerate(names):
        places, heights, below, above = [], [], [], []
        for place, group in enumerate(groups.values()):
            if name in group:
                height, interval = group[name]
                low, high = interval or (height, height)
                places.append(place + (index - (len(names) - 1) / 2) * width)
                heights.append(height)
                below.append(height - low)
                above.append(high - height)
        bars = axes.bar(
            places, [height - base for height in heights], width, bottom=base, label=name,
            color=COLOURS.get(name, OTHER),
            yerr=(below, above) if any(below + above) else None, capsize=2, error_kw={"linewidth": 0.8},
        )
        axes.bar_label(bars, [f"{height:.2f}" for height in heights], fontsize=7, padding=1)
    axes.axhline(1.0, color="black", linewidth=0.6)
    axes.set_xticks(range(len(groups)), list(groups), fontsize=7, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_ylabel(label, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _order(name: str) -> tuple[bool, bool, str]:
    return name.startswith("resfuse"), name not in BASELINES, name


def _short(mode: str) -> str:
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[mode.removeprefix("autocast-")]
