"""Whole runs side by side: a row for each variant, stored as soon as it is there; the table and the comparison."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .host import Host
from .whole import NO_BIAS, OURS, Outcome, Size, Variant, absent, differences, run

SECONDS = ("trunk", "diffusion", "step", "confidence", "total")
KERNELS = ("torch", "triattention", "cuequivariance", NO_BIAS, OURS)
DIFFERENCES = ("rmsd_mean", "rmsd_max", "plddt", "ptm", "distogram")


@dataclass(frozen=True)
class Request:
    """What is run, on which target; `blocks` of each stack where not all.

    seeds: how many, from the size's on; random weights are drawn anew for each.
    """

    size: Size = field(default_factory=Size)
    tokens: int | None = None
    features: Path | None = None
    checkpoint: Path | None = None
    blocks: int | None = None
    device: str = "auto"
    warm: bool = True
    seeds: int = 1
    out: Path = Path()


def table(request: Request, dtype: str = "bf16", kernels: Sequence[str] = KERNELS) -> list[dict[str, Any]]:
    """The paper's table: Protenix' kernels, no bias at all, and ours, each against the run of the first of them.

    Writes protenix_table.csv and protenix_table.png into `request.out`.
    """
    variants = {kernel: Variant(kernel, dtype) for kernel in kernels}
    rows = measure(request, variants, kernels[0], request.out / "protenix_table.csv")
    if any(row["status"] == "ok" for row in rows):
        from flashbias.recipes.machine import choose_device, conditions

        from .figures import draw_table

        draw_table(request.out / "protenix_table.png", rows, conditions(choose_device(request.device)))
    return rows


def compare(request: Request) -> tuple[list[dict[str, Any]], dict[str, bool | None]]:
    """Stock and patched with the same seeds and noise, against the torch kernel in fp32.

    In fp32 (tf32 off) beside the torch kernel with other chunks of rows, in bf16 beside the kernels that Protenix takes
    by default, or the next that is here. Writes protenix_compare.csv. Returns the rows, and whether what is
    promised holds: coordinates in fp32 at most twice as far away as other chunks bring them, in bf16 no further than
    the default kernels (`no_further`). None: could not be measured.
    """
    from flashbias.recipes.machine import choose_device

    device = choose_device(request.device)
    default = next(name for name in ("cuequivariance", "triattention", "torch") if absent(name, device) is None)
    variants = {
        "torch, fp32": Variant("torch", "fp32", tf32=False),
        "torch, fp32, other chunks": Variant("torch", "fp32", other_chunk(request.tokens or 1218), tf32=False),
        "flashbias, fp32": Variant(OURS, "fp32", tf32=False),
        f"{default}, bf16": Variant(default),
        "flashbias, bf16": Variant(OURS),
    }
    rows = measure(request, variants, "torch, fp32", request.out / "protenix_compare.csv")
    measured = [row for row in rows if row["rmsd_mean"] != ""]  # without the reference there is no distance
    rmsd = {name: [row["rmsd_mean"] for row in measured if row["variant"] == name] for name in variants}
    limits = {
        "flashbias, fp32": (2, "torch, fp32, other chunks"),
        "flashbias, bf16": (1, f"{default}, bf16"),
    }
    return rows, {
        f"{ours} within {factor} x {theirs}": no_further(rmsd[ours], [factor * other for other in rmsd[theirs]])
        if len(rmsd[ours]) == len(rmsd[theirs]) == request.seeds
        else None
        for ours, (factor, theirs) in limits.items()
    }


def no_further(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether distances, one for each seed, are no larger than others in the mean.

    Nearly all of a distance in bf16 is due to bf16 elsewhere, and differs by chance: of several seeds, larger is what
    exceeds the others by two standard errors of the difference.
    """
    more = [our - other for our, other in zip(ours, theirs, strict=True)]
    error = statistics.stdev(more) / len(more) ** 0.5 if len(more) > 1 else 0.0
    return statistics.mean(more) <= 2 * error


def other_chunk(tokens: int) -> int:
    """Half as many rows of a triangle attention at a time as Protenix chooses."""
    from .triangle import chunk_size

    return max(1, (chunk_size(tokens) or tokens) // 2)


def prepare(request: Request) -> tuple[str, Any, dict[str, Any], Host]:
    """The device, a console on stderr for progress, the features, and the model."""
    from rich.console import Console

    from flashbias.recipes.machine import choose_device

    from . import features, host

    device, console = choose_device(request.device), Console(stderr=True)
    target = features.load(request.features, request.tokens)
    with console.status("building the model"):
        return device, console, target, host.build(device, request.checkpoint, request.blocks)


def measure(request: Request, variants: Mapping[str, Variant], reference: str, path: Path) -> list[dict[str, Any]]:
    """Rows for the variants, the reference first; one that fails says why, and the others go on."""
    from flashbias.recipes.machine import write_rows

    from . import host

    device, console, target, built = prepare(request)
    common = {
        "tokens": len(target["token_index"]),
        "atoms": len(target["atom_to_token_idx"]),
        "blocks": request.blocks or "all",
        "weights": built.weights,
        "stand_ins": built.stand_ins,
    }
    rows: list[dict[str, Any]] = []
    against: Outcome | None = None
    request.out.mkdir(parents=True, exist_ok=True)
    for seed in range(request.size.seed, request.size.seed + request.seeds):
        size, is_first = replace(request.size, seed=seed), seed == request.size.seed
        if not is_first and request.checkpoint is None:
            host.redraw(built.model, seed)
        for name, variant in variants.items():
            reason, outcome = absent(variant.kernel, device), None
            if reason is None:
                try:
                    with console.status(f"running {name}"):
                        if is_first and request.warm and device != "cpu":
                            run(built, target, variant, Size(1, 2, size.samples), device)
                        outcome = run(built, target, variant, size, device)
                except Exception as error:
                    reason = f"{type(error).__name__}: {error}"[:300]
            status = "ok" if outcome else "absent" if absent(variant.kernel, device) else "failed"
            against = outcome if name == reference else against
            rows.append({"variant": name, **vars(variant), **common, **vars(size), "status": status})
            rows[-1] |= {"reason": reason or "", **_figures(outcome, against), "against": reference}
            write_rows(path, rows, device)
            console.print(_line(rows[-1]), markup=False, highlight=False, soft_wrap=True)
    return rows


def _figures(outcome: Outcome | None, against: Outcome | None) -> dict[str, Any]:
    """Times, memory and differences, empty where there are none."""
    found: dict[str, Any] = dict.fromkeys([*(f"{name}_s" for name in SECONDS), "peak_gib", *DIFFERENCES], "")
    if outcome is not None:
        found |= {f"{name}_s": round(outcome.seconds[name], 4) for name in SECONDS}
        found["peak_gib"] = round(outcome.peak_bytes / 2**30, 3) if outcome.peak_bytes else ""
        if against is not None:
            found |= {name: float(f"{value:.3g}") for name, value in differences(outcome, against).items()}
    return found


def _line(row: Mapping[str, Any]) -> str:
    if row["status"] != "ok":
        return f"{row['variant']}: {row['status']}, {row['reason']}"
    times = ", ".join(f"{name} {row[f'{name}_s']:.3f}" for name in SECONDS)
    return f"{row['variant']}: {times} s; RMSD {row['rmsd_mean']}"


def as_table(rows: Sequence[Mapping[str, Any]], title: str) -> Any:
    """For the terminal: means over seeds."""
    from rich.table import Column, Table

    names = ("trunk, s", "diffusion, s", "a step, ms", "confidence, s", "total, s", "GiB", "RMSD, Å", "pLDDT", "pTM")
    made = Table("attention", *(Column(name, justify="right") for name in (*names, "distogram")), title=title)
    for name in dict.fromkeys(row["variant"] for row in rows):
        some = [row for row in rows if row["variant"] == name]
        if any(row["status"] != "ok" for row in some):
            made.add_row(name, next(row["reason"] for row in some if row["status"] != "ok"))
            continue
        cells = [f"{_mean(some, f'{part}_s') * (1e3 if part == 'step' else 1):.2f}" for part in SECONDS]
        figures = (_mean(some, figure) for figure in ("peak_gib", "rmsd_mean", *DIFFERENCES[2:]))
        made.add_row(name, *cells, *("" if figure is None else f"{figure:.4g}" for figure in figures))
    return made


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> Any:
    """Of a figure, None where it is missing."""
    figures = [row[name] for row in rows]
    return None if "" in figures else statistics.mean(figures)


def title(rows: Sequence[Mapping[str, Any]]) -> str:
    """What was run."""
    row, seeds = rows[0], len({row["seed"] for row in rows})
    return (
        f"{row['tokens']} tokens, {row['atoms']} atoms; {row['cycles']} cycles, {row['steps']} steps, "
        f"{row['samples']} samples, {seeds} seeds; weights: {row['weights']}; differences to {row['against']}"
    )
