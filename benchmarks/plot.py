"""Draws recall against queries a second from recall_qps.py's JSON, as PNG and SVG.

python benchmarks/plot.py benchmarks/results/recall_qps-dev-79890.json
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

# A kind has the same colour in every picture.
STRONG = {
    "vecsvc nng": "#d1004b",
    "vecsvc hnsw": "#0057d9",
    "vecsvc tp_tree": "#f07800",
    "vecsvc faiss HNSW32": "#00875a",
    "vecsvc faiss HNSW32_SQ8": "#57b000",
    "vecsvc exact": "#7a28cb",
    "vecsvc kd_tree": "#00a3bf",
}
SPARE = ("#b8860b", "#e0479e", "#3b4cc0")
MUTED = ("#66788a", "#a3795c", "#6f9068", "#8d7399", "#b5944a", "#5f959c", "#b0777c", "#86894f", "#7479a8")
DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.6)), (0, (1.6, 1.4)))
LOWEST, HIGHEST = 0.80, 0.9995
TICKS = (0.80, 0.85, 0.90, 0.95, 0.98, 0.99, 0.995, 0.999)
LINE_HEIGHT = 0.038  # of the axes, between two labels


def draw(figures: dict[str, Any], beside: Path) -> list[Path]:
    """Write the picture twice beside the JSON file, with its stem. Returns the two paths."""
    dashes = itertools.cycle(DASHES)
    figure = Figure(figsize=(11, 6.6), dpi=150, facecolor="white")
    axes = figure.add_axes((0.065, 0.11, 0.69, 0.75))
    task = figures["task"]
    lines = {system["name"]: curve(system) for system in figures["systems"]}
    lines = {name: line for name, line in lines.items() if line}
    styles = styled(figures["systems"])
    # A lone slow point would squeeze the curves: it is named at the lower edge instead.
    shown = [qps for line in lines.values() for _, qps, _ in line if len(line) > 1]
    shown = shown or [qps for line in lines.values() for _, qps, _ in line] or [1.0]
    bottom = min(shown) / 1.6
    axes.set_yscale("log")
    axes.set_ylim(bottom, max(shown) * 1.35)
    for name, line in lines.items():
        ours, colour = styles[name]
        axes.plot(
            [stretch(recall) for recall, _, _ in line],
            [qps for _, qps, _ in line],
            color=colour,
            linewidth=2.4 if ours else 1.4,
            linestyle="solid" if ours else next(dashes),
            zorder=3 if ours else 2,
        )
        timed = [(stretch(recall), qps) for recall, qps, read in line if read and qps >= bottom]
        axes.scatter(
            [x for x, _ in timed],
            [y for _, y in timed],
            s=22 if ours else 11,
            color=colour,
            zorder=4 if ours else 2,
            clip_on=False,
        )
    axes.set_xlim(stretch(LOWEST), stretch(1.0))
    axes.xaxis.set_major_locator(FixedLocator([stretch(tick) for tick in (*TICKS, 1.0)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{tick:g}" for tick in (*TICKS, 1)])
    axes.yaxis.set_major_locator(FixedLocator(decades(*axes.get_ylim())))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(True, color="#e7eaee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors="#4a5561", labelsize=9.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#b8c0c8")
    axes.set_xlabel(f"recall@{figures['k']}", color="#2a333d", fontsize=10.5)
    axes.set_title(
        f"{task['name']}: {task['rows']:,} x {task['dim']}, {figures['metric']}",
        loc="left", fontsize=14, fontweight="bold", color="#161c22", pad=34,
    )  # fmt: skip
    axes.text(
        0, 1.035, f"Queries a second, one at a time on one thread; up and right is better. {where(figures)}",
        transform=axes.transAxes, fontsize=9, color="#5b6671",
    )  # fmt: skip
    label(axes, lines, styles)
    paths = [beside.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def stretch(recall: float) -> float:
    """The place of a recall on an axis that grows towards 1: each halving of the misses takes the same room."""
    return float(-np.log10(1.0 - min(recall, HIGHEST) + 1e-3))


def curve(system: dict[str, Any]) -> list[tuple[float, float, bool]]:
    """(recall, median QPS, whether a recall in the table is read there), from hasty to thorough."""
    points = [(p["recall"], statistics.median(p["qps"]), bool(p["batch_qps"])) for p in system["points"] if p["qps"]]
    return [point for point in points if point[0] >= LOWEST]


def styled(entries: Sequence[dict[str, Any]]) -> dict[str, tuple[bool, str]]:
    """Whether a system is ours, and its colour."""
    spare, muted = itertools.cycle(SPARE), itertools.cycle(MUTED)
    ours = {e["name"]: (True, STRONG.get(e["name"]) or next(spare)) for e in entries if e["ours"]}
    return ours | {e["name"]: (False, next(muted)) for e in entries if not e["ours"]}


def label(axes: Any, lines: dict[str, list[tuple[float, float, bool]]], styles: dict[str, tuple[bool, str]]) -> None:
    """Each name at the right end of its line, moved apart where two would cover each other."""
    to_axes = axes.transAxes.inverted()
    bottom = axes.get_ylim()[0]
    ends, texts = {}, {}
    for name, line in lines.items():
        recall, qps, _ = line[-1]
        x, y = to_axes.transform(axes.transData.transform((stretch(recall), max(qps, bottom))))
        ends[name] = (float(x), float(y) + 1e-9 * qps)  # those at the lower edge keep their order
        texts[name] = name if qps >= bottom else f"{name} ↓ {qps:,.0f}"
    places = spread([ends[name][1] for name in ends], LINE_HEIGHT)
    for (name, (x, y)), place in zip(ends.items(), places, strict=True):
        ours, colour = styles[name]
        axes.annotate(
            texts[name],
            xy=(x, y), xycoords="axes fraction", xytext=(1.03, place), textcoords="axes fraction",
            color=colour, fontsize=10 if ours else 9, va="center",
            fontweight="bold" if ours else "normal", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "alpha": 0.6, "shrinkA": 2, "shrinkB": 3},
        )  # fmt: skip


def spread(places: Sequence[float], apart: float) -> list[float]:
    """The places in their order, moved as little as may be so that neighbours are `apart`, within 0 to 1 if they fit.

    Groups that touch are merged and centred on the mean of where they wanted to be.
    """
    order = np.argsort(places, kind="stable")
    groups: list[list[float]] = []  # sum of the wishes for its lowest place, count
    for at in order:
        groups.append([places[at], 1])
        while len(groups) > 1 and low(groups[-2]) + groups[-2][1] * apart > low(groups[-1]):
            wish, count = groups.pop()
            groups[-1][0] += wish - count * groups[-1][1] * apart
            groups[-1][1] += count
    result = [0.0] * len(places)
    where_to = iter(order)
    for group in groups:
        lowest = min(max(low(group), 0.0), max(0.0, 1.0 - (group[1] - 1) * apart))
        for i in range(int(group[1])):
            result[next(where_to)] = lowest + i * apart
    return result


def low(group: list[float]) -> float:
    return group[0] / group[1]


def decades(bottom: float, top: float) -> list[float]:
    steps = [step * 10.0**power for power in range(-2, 8) for step in (1, 2, 5)]
    return [step for step in steps if bottom <= step <= top]


def where(figures: dict[str, Any]) -> str:
    machine = figures["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['when'][:10]}"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/plot.py FILE.json")
    for written in draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1])):
        print(f"wrote {written}")
