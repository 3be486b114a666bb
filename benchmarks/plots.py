"""Drawings of what was measured, as SVG files beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any


def short(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One drawing of a few rows: how long shardkit takes, as a multiple of what its peer takes."""
    import_module("matplotlib").use("svg")
    # Letters as text, and the same drawing of the same figures.
    import_module("matplotlib").rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "shardkit"})
    pyplot = import_module("matplotlib.pyplot")
    names = [f"{row['what']}, beside {row['peer']}" for row in rows]
    ratios = [row["ratio"] for row in rows]
    figure, axes = pyplot.subplots(figsize=(8, 0.3 * len(names) + 1))
    bars = axes.barh(names, [ratio - 1 for ratio in ratios], left=1, color="#2b6cb0")
    axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=4)
    axes.axvline(1, color="#1a202c", linewidth=1)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set_xlabel("time of shardkit / time of the peer, in the same run")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def draw(rows: Sequence[dict[str, Any]], beside: Path) -> Iterator[Path]:
    """One drawing of each benchmark that has several peers: the time of each, on a logarithmic axis."""
    # Not a requirement of the development: only who runs the benchmarks has it.
    import_module("matplotlib").use("svg")
    pyplot = import_module("matplotlib.pyplot")
    for what in dict.fromkeys(row["what"] for row in rows):
        those = [row for row in rows if row["what"] == what]
        if len(those) < 2:
            continue
        names = ["shardkit", *(row["peer"] for row in those)]
        times = [those[0]["fastest"] * 1e9, *(row["peer_fastest"] * 1e9 for row in those)]
        figure, axes = pyplot.subplots(figsize=(7, 0.4 * len(names) + 1))
        bars = axes.barh(names, times, color=["#2b6cb0", *["#a0aec0"] * len(those)])
        axes.bar_label(bars, [f"{time:,.0f} ns" for time in times], padding=4)
        axes.set_xscale("log")
        axes.margins(x=0.2)
        axes.invert_yaxis()
        axes.set_title(what, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        path = beside.with_name(f"{beside.stem}-{_plain(what)}.svg")
        figure.savefig(path, bbox_inches="tight")
        pyplot.close(figure)
        yield path


def _plain(text: str) -> str:
    return "-".join("".join(letter if letter.isalnum() else " " for letter in text).split())
