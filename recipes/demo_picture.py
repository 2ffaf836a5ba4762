"""The pictures of `flashbias demo`. matplotlib is imported when one is drawn."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .demo_digits import Layer

STOCK, OURS, OTHERS = "#8a8f98", "#d9480f", "#c5cad3"
LINES = ("#0b7285", "#5f3dc4", "#2b8a3e", "#e67700")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "flashbias",
}


def draw_digits(path: Path, result: Mapping[str, Any], layers: Sequence[Layer]) -> None:
    """Bias maps, spectra, and bars for the two evaluations of the small model."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = _figure(12, 6.8)
        rows = figure.add_gridspec(2, 1, left=0.05, right=0.97, top=0.82, bottom=0.13, hspace=0.42)
        _maps(figure, rows[0].subgridspec(1, 4, wspace=0.25, width_ratios=(1, 1, 1, 0.95)), layers)
        lower = rows[1].subgridspec(1, 3, width_ratios=(1.5, 1, 1), wspace=0.3)
        _spectra(figure.add_subplot(lower[0]), layers)
        _pair(figure.add_subplot(lower[1]), "fastest pass", "ms", result, "seconds", 1e3)
        _pair(figure.add_subplot(lower[2]), "peak memory of a pass", "MiB", result, "peak_mib", 1)
        same = (
            f"largest difference of logits {result['largest_logit_difference']:.0e} (of {result['largest_logit']:.1f})"
        )
        _head(
            figure,
            "SwinV2 reads handwritten digits: the same weights, timm's code and flashbias",
            f"Top-1 of {result['images']} held-out images {result['top1_stock']:.2%} with timm, "
            f"{result['top1_patched']:.2%} patched; {same}",
        )
        _foot(figure, result, f"one batch of {result['images']} images of 64 px, fp32, inference")
        figure.savefig(path, dpi=150)


def draw_base(path: Path, rows: Sequence[Mapping[str, Any]], conditions: Mapping[str, Any]) -> None:
    """Bars for time and memory of every variant of the large model."""
    import matplotlib

    half = [row for row in rows if row["dtype"] != "float32"]
    with matplotlib.rc_context(STYLE):
        figure = _figure(12, 5.2)
        columns = figure.add_gridspec(1, 2, left=0.155, right=0.96, top=0.8, bottom=0.17, wspace=0.12)
        _ranking(figure.add_subplot(columns[0]), half, "milliseconds", "Time of a batch, ms", "{:.1f}", names=True)
        _ranking(
            figure.add_subplot(columns[1]), half, "peak_gib", "Peak memory with weights, GiB", "{:.1f}", names=False
        )
        ours = {row["mode"]: row["relative_logit_error"] for row in half if row["variant"] == "flashbias"}
        stock = {row["mode"]: row["relative_logit_error"] for row in half if row["variant"] == "timm"}
        errors = "; ".join(
            f"{mode}: timm {stock[mode]:.0e}, flashbias {ours[mode]:.0e}" for mode in ours if mode in stock
        )
        _head(
            figure,
            f"{rows[0]['model']}, inference, batch {rows[0]['batch']}, fp16 autocast",
            f"Largest error of the logits against timm in fp32, relative: {errors}",
        )
        _foot(
            figure, conditions, "hatched: bias and mask left out, which is wrong, and a bound for torch's own attention"
        )
        figure.savefig(path, dpi=150)


def _figure(width: float, height: float) -> Figure:
    """A figure without pyplot, which would look for a screen and keep the figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _head(figure: Figure, title: str, subtitle: str) -> None:
    figure.text(0.02, 0.945, title, fontsize=14, fontweight="bold")
    figure.text(0.02, 0.905, subtitle, fontsize=10, color="#495057")


def _foot(figure: Figure, conditions: Mapping[str, Any], how: str) -> None:
    versions = ", ".join(f"{name} {conditions[name]}" for name in ("torch", "triton", "flashbias") if conditions[name])
    text = f"{conditions['device']}; {versions} ({conditions['commit'] or 'no commit'}); {how}"
    figure.text(0.02, 0.025, text, fontsize=8, color="#868e96")


def _maps(figure: Figure, grid: Any, layers: Sequence[Layer]) -> None:
    """The bias that varies most, as timm makes it, from factors, and what these leave out; what each layer keeps."""
    layer, head = _most_varied(layers)
    found, table = layer.found, layer.table[head].cpu()
    rebuilt = (found.q_factor[head].float() @ found.k_factor[head].float().mT).cpu()
    left_out = table - rebuilt
    limit = float(table.abs().max())
    for column, (values, title, bound) in enumerate(
        (
            (table, f"bias of {_name(layer)}, head {head}", limit),
            (rebuilt, f"from factors of rank {found.rank}", limit),
            (left_out, f"left out: output error {float(found.output_error[head]):.1%}", float(left_out.abs().max())),
        )
    ):
        axes = figure.add_subplot(grid[column])
        image = axes.imshow(
            values.numpy(), cmap="RdBu_r", vmin=-bound, vmax=bound, interpolation="nearest", aspect="auto"
        )
        axes.set(title=title, xlabel="key", ylabel="query" if column == 0 else "", xticks=[], yticks=[])
        figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    axes = figure.add_subplot(grid[3])
    axes.set_title("what each layer keeps")
    axes.axis("off")
    lines = [f"{_name(layer)}: {_kept(layer)}" for layer in layers]
    reasons = dict.fromkeys(layer.choice.reason for layer in layers)
    lines += ["", *(line for reason in reasons for line in textwrap.wrap(f"({reason})", 38))]
    axes.text(0, 0.97, "\n".join(lines), transform=axes.transAxes, va="top", fontsize=9, linespacing=1.5)


def _name(layer: Layer) -> str:
    return layer.choice.layer.replace("layers.", "stage ").replace(".blocks.", " block ").removesuffix(".attn")


def _kept(layer: Layer) -> str:
    return "the exact table" if layer.choice.bias == "exact" else f"factors of rank {layer.choice.rank}"


def _most_varied(layers: Sequence[Layer]) -> tuple[Layer, int]:
    layer = max(layers, key=lambda layer: float(layer.table.square().mean((-2, -1)).max()))
    return layer, int(layer.table.square().mean((-2, -1)).argmax())


def _spectra(axes: Axes, layers: Sequence[Layer]) -> None:
    """Singular values of every head, a colour for each layer."""
    for color, layer in zip(LINES * len(layers), layers, strict=False):
        for head, values in enumerate(layer.found.spectrum.cpu()):
            label = _name(layer) if head == 0 else None
            axes.semilogy(
                range(1, len(values) + 1), (values / values[0]).numpy(), color=color, lw=1.2, alpha=0.8, label=label
            )
    axes.axvline(16, color="#adb5bd", lw=1, ls=":")
    axes.text(16.5, 0.6, "rank 16", fontsize=8, color="#868e96")
    axes.set(title="spectra of the biases, a line for each head", xlabel="singular value", ylim=(1e-5, 1.5))
    axes.legend(frameon=False, fontsize=8, loc="upper right")


def _pair(axes: Axes, title: str, unit: str, result: Mapping[str, Any], key: str, factor: float) -> None:
    stock, ours = (result[f"{key}_{who}"] * factor for who in ("stock", "patched"))
    bars = axes.bar(("timm", "flashbias"), (stock, ours), color=(STOCK, OURS), width=0.55)
    labels = [f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in (stock, ours)]
    axes.bar_label(bars, [labels[0], f"{labels[1]} ({ours / stock:.0%})"], padding=2)
    axes.set(title=f"{title}, {unit}", yticks=[], ylim=(0, 1.15 * max(stock, ours)))
    axes.spines["left"].set_visible(False)


def _ranking(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, title: str, form: str, names: bool) -> None:
    """A bar for each variant, eager above compiled."""
    labels = [f"{row['variant']}, {row['mode']}" for row in rows]
    colors = [{"timm": STOCK, "flashbias": OURS}.get(row["variant"], OTHERS) for row in rows]
    bars = axes.barh(labels, [row[key] for row in rows], color=colors, height=0.65)
    for bar, row in zip(bars, rows, strict=True):
        if "no bias" in row["variant"]:
            bar.set(hatch="///", edgecolor="white")
    axes.bar_label(bars, fmt=form, padding=3)
    axes.invert_yaxis()
    axes.set(title=title, xticks=[])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(left=False, labelleft=names)
