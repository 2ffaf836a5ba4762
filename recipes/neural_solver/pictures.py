"""Pictures of the results, from their CSV, and of the bias itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .rows import like_the_last, load
from .training import SETTINGS, summary

COLOURS = ("#555555", "#d1495b", "#00798c", "#edae49", "#66a182", "#8d6a9f")


def conditions(rows: Sequence[dict[str, str]]) -> str:
    """What the rows were measured on."""
    row = rows[-1]
    triton = f", triton {row['triton']}" if row["triton"] else ""
    return f"{row['device']}, torch {row['torch']}{triton}, flashbias {row['commit'] or row['flashbias']}"


def elasticity(folder: Path) -> Path:
    """Curves of loss and error, and time and memory."""
    plt = _pyplot()
    rows = like_the_last(load(folder / "elasticity.csv"), SETTINGS)
    names = list(dict.fromkeys(row["variant"] for row in rows))
    figure, axes = plt.subplots(1, 4, figsize=(17, 4.2), width_ratios=(3, 3, 2, 2), layout="constrained")
    for colour, name in zip(COLOURS, names, strict=False):
        own = [row for row in rows if row["variant"] == name]
        epochs = [int(row["epoch"]) for row in own]
        axes[0].plot(epochs, [float(row["train_loss"]) for row in own], color=colour, label=name)
        axes[1].plot(epochs, [float(row["relative_l2"]) for row in own], color=colour, label=name)
    for axis, title in zip(axes, ("training loss", "relative L2, samples not trained on"), strict=False):
        axis.set(title=title, xlabel="epoch", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend()
    totals = summary(rows)
    _bars(axes[2], names, [total["ms"] for total in totals], "ms per iteration")
    _bars(axes[3], names, [total["peak_gb"] for total in totals], "peak memory, GB")
    row = rows[-1]
    figure.suptitle(
        f"elasticity, {row['points']} points, {row['layers']} layers, {row['train']} samples, batch {row['batch']}; "
        + conditions(rows)
    )
    return _save(figure, folder / "elasticity.png")


def car(folder: Path) -> Path:
    """Time and memory of every variant."""
    plt = _pyplot()
    rows = like_the_last(load(folder / "car.csv"), ("points", "layers", "device"))
    figure, axes = plt.subplots(2, 2, figsize=(11, 6), layout="constrained")
    for i, mode in enumerate(("inference", "training")):
        own = [row for row in rows if row["mode"] == mode and row["status"] == "ok"]
        names = [row["variant"] for row in own]
        _bars(axes[0][i], names, [float(row["ms"]) for row in own], f"{mode}, ms")
        _bars(axes[1][i], names, [float(row["peak_gb"]) for row in own], f"{mode}, peak memory, GB")
    figure.suptitle(f"car model, {rows[-1]['layers']} layers, {rows[-1]['points']} points; {conditions(rows)}")
    return _save(figure, folder / "car.png")


def scale(folder: Path) -> Path:
    """Time, memory and share of the limit over the number of points."""
    plt = _pyplot()
    rows = [row for row in like_the_last(load(folder / "scale.csv"), ["device"]) if row["status"] == "ok"]
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    kinds = list(dict.fromkeys((row["mode"], row["layers"]) for row in rows))
    for colour, (mode, layers) in zip(COLOURS[1:], kinds, strict=False):
        own = sorted(
            (row for row in rows if (row["mode"], row["layers"]) == (mode, layers)), key=lambda row: int(row["points"])
        )
        points = [int(row["points"]) for row in own]
        label = f"{mode}, {layers} layer{'s' if layers != '1' else ''}"
        axes[0].plot(points, [float(row["ms"]) / 1e3 for row in own], "o-", color=colour, label=label)
        axes[1].plot(points, [float(row["peak_gb"]) for row in own], "o-", color=colour)
        limited = [row for row in own if row["limit_fraction"]]
        axes[2].plot(
            [int(row["points"]) for row in limited], [float(row["limit_fraction"]) for row in limited], "o-",
            color=colour,
        )  # fmt: skip
    titles = ("seconds", "peak memory, GB", "share of the chip's limit")
    sizes = sorted({int(row["points"]) for row in rows})
    for axis, title, logarithmic in zip(axes, titles, (True, True, False), strict=True):
        axis.set(title=title, xlabel="points", xscale="log", yscale="log" if logarithmic else "linear")
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[2].set_ylim(0, 1)
    axes[0].legend()
    figure.suptitle(f"car model at any size; {conditions(rows)}")
    return _save(figure, folder / "scale.png")


def bias(folder: Path, points: int, seed: int = 0) -> Path:
    """The weights that distances alone give to all points of a body, for three queries and two signs of the weight."""
    import numpy as np
    import torch

    from flashbias import SpatialDistance

    from .car_data import surface

    plt = _pyplot()
    body, _ = surface(points, np.random.default_rng(seed))
    x = torch.from_numpy(body).float()
    queries = [int(np.argmax(body @ direction)) for direction in ([1, 0.5, -0.6], [0, 1, 0], [-1, 0, -0.5])]
    drawing = {"projection": "3d", "computed_zorder": False}  # queries in front of everything
    figure, axes = plt.subplots(2, 3, figsize=(15, 6), subplot_kw=drawing, layout="constrained")
    for line, weight in zip(axes, (1.0, -0.5), strict=True):
        values = SpatialDistance(x[queries], x, torch.full((1, len(queries)), weight)).dense(len(queries), points)[0]
        for axis, query, value in zip(line, queries, values, strict=True):
            drawn = axis.scatter(body[:, 0], body[:, 2], body[:, 1], c=value, s=20000 / points, cmap="viridis")
            axis.scatter(*body[query, [0, 2, 1]], color="red", s=60, depthshade=False)
            axis.set_box_aspect(np.ptp(body, axis=0)[[0, 2, 1]], zoom=1.2)
            axis.view_init(22, -58)
            axis.set_axis_off()
            figure.colorbar(drawn, ax=axis, shrink=0.5, label=f"{-weight:g} $|x_i - x_j|^2$")
    figure.suptitle(f"bias of a query (red) towards every point of a body, {points} points")
    return _save(figure, folder / "bias_on_car.png")


def _bars(axis: Any, names: Sequence[str], values: Sequence[float | None], title: str) -> None:
    heights = [value or 0.0 for value in values]
    axis.bar_label(axis.barh(list(names), heights, color=COLOURS[: len(names)]), fmt="%.3g", padding=2)
    axis.set_title(title)
    axis.invert_yaxis()
    axis.margins(x=0.18)


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    _pyplot().close(figure)
    return path


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
