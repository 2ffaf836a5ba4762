"""The pictures of the Protenix recipes. matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashbias.recipes.demo_picture import LINES, OTHERS, OURS, STOCK, STYLE

from .whole import OURS as FLASHBIAS

STAGES = {"trunk": LINES[0], "diffusion": LINES[1], "confidence": LINES[2]}


def draw_table(path: Path, rows: Sequence[Mapping[str, Any]], conditions: Mapping[str, Any]) -> None:
    """Bars of the seconds by stage, and of the coordinates' distance from the run that all are compared with."""
    import matplotlib
    from matplotlib.figure import Figure

    from .report import title

    done = [row for row in rows if row["status"] == "ok"][::-1]
    names = [row["variant"] for row in done]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 1.6 + 0.45 * len(done)), layout="constrained")
        times, quality = figure.subplots(1, 2, width_ratios=(2, 1), sharey=True)
        left = [0.0] * len(done)
        for stage, colour in STAGES.items():
            seconds = [row[f"{stage}_s"] for row in done]
            times.barh(names, seconds, left=left, color=colour, label=stage)
            left = [a + b for a, b in zip(left, seconds, strict=True)]
        for i, (end, row) in enumerate(zip(left, done, strict=True)):
            memory = f", {row['peak_gib']} GiB" if row["peak_gib"] else ""
            times.text(end, i, f" {row['total_s']:.2f} s in all{memory}", va="center", fontsize=8)
        times.set(xlabel="seconds", title="Time by stage, peak memory", xlim=(0, 1.35 * max(left)))
        times.legend(frameon=False, fontsize=8, loc="lower right")
        found = [row["rmsd_mean"] for row in done]
        values = [value or 0.0 for value in found]
        quality.barh(names, values, color=[_colour(name) for name in names])
        for i, value in enumerate(found):
            text = "not compared" if value == "" else f"{value:.2g}"
            quality.text(values[i], i, f" {text}", va="center", fontsize=8)
        quality.set(xlabel="Å", title=f"RMSD to the run of {rows[0]['against']}", xlim=(0, 1.3 * (max(values) or 1)))
        figure.suptitle(f"Protenix: {title(rows)}", fontsize=9, x=0.01, ha="left", wrap=True)
        _foot(figure, conditions)
        figure.savefig(path, dpi=150)


def draw_sweep(path: Path, rows: Sequence[Mapping[str, Any]], conditions: Mapping[str, Any]) -> None:
    """A curve for each kernel over the number of tokens, a panel for each part of the model."""
    import matplotlib
    from matplotlib.figure import Figure

    parts = list(dict.fromkeys(row["part"] for row in rows))
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1 + 4 * len(parts), 4.4), layout="constrained")
        panels = figure.subplots(1, len(parts), squeeze=False)[0]
        for panel, part in zip(panels, parts, strict=True):
            for i, kernel in enumerate(kernels):
                points = [(row["tokens"], row["ms"]) for row in rows if (row["part"], row["kernel"]) == (part, kernel)]
                points = [point for point in points if point[1] != ""]
                if points:
                    colour = OURS if kernel == FLASHBIAS else LINES[i % len(LINES)]
                    panel.plot(*zip(*points, strict=True), marker="o", ms=3, color=colour, label=kernel)
            panel.set(xscale="log", yscale="log", xlabel="tokens", title=part)
            ticks = sorted({row["tokens"] for row in rows})
            panel.set_xticks(ticks, labels=map(str, ticks))
            panel.minorticks_off()
        panels[0].set_ylabel("milliseconds")
        panels[0].legend(frameon=False, fontsize=8)
        _foot(figure, conditions)
        figure.savefig(path, dpi=150)


def draw_profile(path: Path, rows: Sequence[Mapping[str, Any]], conditions: Mapping[str, Any]) -> None:
    """Bars of the milliseconds by families of kernels, a panel for each stage."""
    import matplotlib
    from matplotlib.figure import Figure

    stages = list(dict.fromkeys(row["stage"] for row in rows))
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))[::-1]
    families = list(dict.fromkeys(row["family"] for row in rows))
    found = {(row["stage"], row["kernel"], row["family"]): row for row in rows}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 1.0 + len(stages) * (0.6 + 0.4 * len(kernels))), layout="constrained")
        panels = figure.subplots(len(stages), 1, squeeze=False)[:, 0]
        for panel, stage in zip(panels, stages, strict=True):
            left = [0.0] * len(kernels)
            for i, family in enumerate(families):
                times = [found[stage, kernel, family]["ms"] for kernel in kernels]
                panel.barh(kernels, times, left=left, color=f"C{i}", label=family)
                left = [a + b for a, b in zip(left, times, strict=True)]
            for i, kernel in enumerate(kernels):
                clock = found[stage, kernel, families[0]]["clock_ms"]
                panel.text(left[i], i, f" {left[i]:.2f}, by the clock {clock:.2f}", va="center", fontsize=8)
            panel.set(title=stage, xlim=(0, 1.4 * (max(left) or 1)))
        names = panels[0].get_legend_handles_labels()
        figure.legend(*names, frameon=False, fontsize=8, ncols=len(families), loc="outside upper right")
        panels[-1].set_xlabel("milliseconds of a cycle, a step, the confidence head")
        _foot(figure, conditions)
        figure.savefig(path, dpi=150)


def _foot(figure: Any, conditions: Mapping[str, Any]) -> None:
    versions = ", ".join(f"{name} {conditions[name]}" for name in ("torch", "triton", "flashbias") if conditions[name])
    text = f"{conditions['device']}; {versions} ({conditions['commit'] or 'no commit'})"
    figure.supxlabel(text, fontsize=7, x=0.01, ha="left", color=STOCK)


def _colour(name: str) -> str:
    return OURS if name.startswith(FLASHBIAS) else OTHERS
