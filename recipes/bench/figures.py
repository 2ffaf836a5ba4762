"""Pictures of stored results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .peers import OURS
from .report import TITLES, conditions
from .results import Row

COLUMNS = 3  # curves side by side
MARKERS = "sD^vP*Xph<>8d"


def draw(rows: Sequence[Row], mode: str, path: Path) -> None:
    """The figure of a mode: curves over lengths where a workload has several, else the tax of everyone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    shown = [row for row in rows if row.mode == mode and row.milliseconds is not None]
    lengths = {(row.workload, row.n_k) for row in shown}
    several = len(lengths) > len({row.workload for row in shown})
    figure = _curves(shown) if several else _taxes(shown)
    figure.suptitle(TITLES[mode], fontsize=11)
    figure.supxlabel(conditions(shown) + "; crosses failed the accuracy check", fontsize=7)
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _taxes(rows: Sequence[Row]) -> Any:
    """A line for each workload, on it a mark for each peer, and bars from gate to goal."""
    from matplotlib.figure import Figure

    workloads, styles = list(dict.fromkeys(row.workload for row in rows)), _styles(rows)
    figure = Figure(figsize=(9, 1.6 + 0.42 * len(workloads)), layout="constrained")
    axes = figure.subplots()
    for peer, style in styles.items():
        for accurate in (True, False):
            own = [row for row in rows if row.peer == peer and bool(row.accurate) is accurate]
            axes.scatter(
                [math.nan if row.tax is None else row.tax for row in own],
                [workloads.index(row.workload) for row in own],
                s=70 if peer == OURS else 36,
                label=peer if accurate else None,
                zorder=3 if peer == OURS else 2,
                **style if accurate else {"color": style["color"], "marker": "x"},
            )
    for row in rows:
        if row.target:
            gate, goal = row.target
            axes.plot((goal, gate), [workloads.index(row.workload)] * 2, color="0.8", lw=7, zorder=1)
    axes.axvline(1, color="0.5", lw=0.8)
    axes.set_xscale("log")
    ticks = (0.5, 0.6, 0.8, 1, 1.2, 1.5, 2, 3, 5, 10)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    taxes = [row.tax for row in rows if row.tax is not None]
    axes.set_xlim(0.9 * min([0.6, *taxes]), 1.1 * max([1.5, *taxes]))
    axes.set_yticks(range(len(workloads)), workloads)
    axes.invert_yaxis()
    axes.grid(axis="x", color="0.9")
    axes.set_xlabel("time / time of SDPA without any bias, same run (grey: from goal to gate)")
    if styles:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _curves(rows: Sequence[Row]) -> Any:
    """Scores a second over the length, for each workload."""
    from matplotlib.figure import Figure

    workloads, styles = list(dict.fromkeys(row.workload for row in rows)), _styles(rows)
    lines = -(-len(workloads) // COLUMNS)
    figure = Figure(figsize=(11, 0.8 + 2.6 * lines), layout="constrained")
    grid = figure.subplots(lines, COLUMNS, squeeze=False).flatten()
    handles: dict[str, Any] = {}
    for axes, workload in zip(grid, workloads, strict=False):
        for peer, style in styles.items():
            own = sorted((row for row in rows if (row.workload, row.peer) == (workload, peer)), key=lambda row: row.n_k)
            if own:
                speeds = [(row.scores_per_second or 0) / 1e12 for row in own]
                (handles[peer],) = axes.plot([row.n_k for row in own], speeds, ms=4, lw=1.2, **style)
                bad = [i for i, row in enumerate(own) if not row.accurate]
                axes.scatter([own[i].n_k for i in bad], [speeds[i] for i in bad], marker="x", color="black", zorder=3)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_title(workload, fontsize=9)
        axes.grid(color="0.9")
        axes.tick_params(labelsize=7)
    for axes in grid[len(workloads) :]:
        axes.set_axis_off()
    figure.supylabel("1e12 scores a second, over N", fontsize=9)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Colour and mark of each peer: ours first, as a red circle."""
    others = list(dict.fromkeys(row.peer for row in rows if row.peer != OURS))
    colours = [f"C{i}" for i in range(len(others) + 1) if i != 3]  # C3 is red
    styles = {OURS: {"color": "C3", "marker": "o"}} if len(others) < len({row.peer for row in rows}) else {}
    for i, (peer, colour) in enumerate(zip(others, colours, strict=False)):
        styles[peer] = {"color": colour, "marker": MARKERS[i % len(MARKERS)]}
    return styles
