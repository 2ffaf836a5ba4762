"""What a person sees of results: tables, and the line of JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .peers import OURS
from .results import Row

if TYPE_CHECKING:
    from rich.table import Table

TITLES = {"fwd": "forward", "fwdbwd": "forward and backward, all gradients"}
COLUMNS = (
    "workload", "peer", "ms", "20-80 %", "tax", "gate", "goal", "1e12 scores/s", "of limit", "peak MiB", "first s",
    "new N ms", "host us", "accurate",
)  # fmt: skip
BLOCK = 128  # lengths that are no multiple of it are compared with the next lower one
BOUNDS = {"first_call_seconds": 3.0, "new_length_ms": 1.0, "host_us": 80.0}  # of every call; the last forward


def table(rows: Sequence[Row], mode: str) -> Table:
    """The rows of a mode, without columns in which nothing stands."""
    from rich.table import Table

    shown = [row for row in rows if row.mode == mode]
    lines = [(f"{row.workload}, N {row.n_k}", row.peer, *_cells(row)) for row in shown]
    used = [i for i in range(len(COLUMNS)) if any(line[i] for line in lines)]
    result = Table(*(COLUMNS[i] for i in used), title=f"{TITLES[mode]}; {conditions(shown)}")
    previous = ""
    for line in lines:
        if previous not in ("", line[0]):
            result.add_section()
        result.add_row("" if line[0] == previous else line[0], *(line[i] for i in used[1:]))
        previous = line[0]
    return result


def line(row: Row) -> str:
    """A row in short, while others are still to come."""
    from rich.markup import escape

    start = f"{_name(row)}: {row.peer} "
    if row.milliseconds is None:
        return start + f"{row.status}, {escape(row.reason)}"
    return start + f"{row.milliseconds:.3f} ms, tax {_number(row.tax, '.3f')}, accurate: {row.accurate}"


def conditions(rows: Sequence[Row]) -> str:
    """On what the rows were measured, each value once."""
    texts = []
    for name in ("device", "dtype", "torch", "triton", "cudnn", "driver", "commit"):
        values = sorted({getattr(row, name) for row in rows} - {""})
        if values:
            texts.append(("" if name in ("device", "dtype") else f"{name} ") + ", ".join(values))
    return "; ".join(texts)


def summary(rows: Sequence[Row], files: Iterable[Path]) -> dict[str, Any]:
    """Gates and goals met and missed, what of ours is wrong or over a bound, and all rows in short."""
    found: dict[str, Any] = {"recipe": "bench", "conditions": conditions(rows)}
    for kind in ("gate", "goal"):
        aimed = [(row, getattr(row.target, kind)) for row in rows if row.target]
        found[f"{kind}s_met"] = [_name(row) for row, tax in aimed if row.meets(tax)]
        found[f"{kind}s_missed"] = {_name(row): _excess(row, tax) for row, tax in aimed if not row.meets(tax)}
    found["wrong"] = [_name(row) for row in wrong(rows)]
    found["worst"] = worst(rows)
    found["odd_lengths"] = odd_lengths(rows)
    found["deterministic"] = deterministic(rows)
    found["rows"] = [
        {
            "of": _name(row), "peer": row.peer, "status": row.status, "ms": _round(row.milliseconds),
            "tax": _round(row.tax), "accurate": row.accurate,
        }
        for row in rows
    ]  # fmt: skip
    return found | {"files": [str(path) for path in files]}


def wrong(rows: Iterable[Row]) -> list[Row]:
    """Rows of ours that have no accurate result."""
    return [row for row in rows if row.peer.startswith(OURS) and not row.accurate]


def worst(rows: Iterable[Row]) -> dict[str, Any]:
    """Ours: the highest of what has a bound for every call, with the bound and where it was."""
    ours = [row for row in rows if row.peer == OURS]
    found = {}
    for name, bound in BOUNDS.items():
        values = [(getattr(row, name), row) for row in ours if name != "host_us" or row.mode == "fwd"]
        known = [(value, _name(row)) for value, row in values if value is not None]
        if known:
            value, where = max(known)
            found[name] = {"value": _round(value), "bound": bound, "met": value <= bound, "of": where}
    return found


def deterministic(rows: Iterable[Row]) -> dict[str, float]:
    """Ours under torch's deterministic switch: its time over that without."""
    times = {(row.peer, _name(row)): row.milliseconds for row in rows}
    found = {}
    for (peer, name), time in times.items():
        plain = times.get((OURS, name))
        if peer == f"{OURS}-deterministic" and time and plain:
            found[name] = round(time / plain, 3)
    return found


def odd_lengths(rows: Sequence[Row]) -> dict[str, float]:
    """Ours at lengths that are no multiple of 128: scores a second, relative to the next lower multiple's."""
    speeds = {(row.workload, row.mode, row.n_k): row.scores_per_second for row in rows if row.peer == OURS}
    found = {}
    for (workload, mode, n), speed in speeds.items():
        even = speeds.get((workload, mode, n // BLOCK * BLOCK))
        if n % BLOCK and speed and even:
            found[f"{workload} {mode} N {n}"] = round(speed / even, 3)
    return found


def _cells(row: Row) -> list[str]:
    from rich.markup import escape

    if row.status != "ok":
        return [f"[dim]{row.status}", *[""] * (len(COLUMNS) - 4), f"[dim]{escape(row.reason)}"]
    target = row.target
    accurate = "yes" if row.accurate else f"[red]no[/]: {escape(row.reason)}"
    if row.bias_gradient is False:
        accurate += ", bias without gradient"
    speed = None if row.scores_per_second is None else row.scores_per_second / 1e12
    return [
        _number(row.milliseconds, ".3f") + {"graph": " g"}.get(row.timed_by, ""),
        f"{_number(row.p20, '.3f')}-{_number(row.p80, '.3f')}",
        _number(row.tax, ".2f"),
        *(_verdict(row, tax) for tax in (target or (None, None))),
        _number(speed, ".3g"),
        _number(row.limit_fraction, ".0%"),
        _number(row.peak_mib, ".1f"),
        _number(row.first_call_seconds, ".2f"),
        _number(row.new_length_ms, ".2f"),
        _number(row.host_us, ".0f"),
        accurate,
    ]


def _verdict(row: Row, tax: float | None) -> str:
    met = row.meets(tax)
    return "" if met is None else f"{tax:.2f} " + ("[green]met" if met else "[red]missed")


def _excess(row: Row, tax: float) -> str:
    if row.tax is None or not row.accurate:
        return row.reason or "no accurate result"
    return f"{row.tax:.3f} for {tax:.2f}"


def _name(row: Row) -> str:
    return f"{row.workload} {row.mode} N {row.n_k}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
