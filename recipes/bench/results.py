"""A row of results, where rows are stored, and what they say of gates."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .peers import OURS
from .workloads import BY_NAME, Target


@dataclass
class Row:
    """One peer on one workload. Empty where it does not apply or was not measured; `reason` says why.

    status: "ok", "absent", "refused" (the peer cannot do it) or "failed". bias_gradient: with a way back, whether the
    tensors of the bias have got theirs too. tax: of the baseline's median in the same process. limit_fraction: of
    what the chip can do. errors: for output and gradients, the largest error / that of an eager computation.
    peak_mib: the rise during a call, and what the peer made beforehand. first_call_seconds: in a process with empty
    caches. new_length_ms: on the host, first calls of new lengths after that, the median. host_us: on the host, one
    more.
    """

    workload: str
    mode: str
    peer: str
    batch: int
    heads: int
    n_q: int
    n_k: int
    head_dim: int
    rank: int
    bias: str
    causal: bool
    dtype: str = ""
    status: str = "ok"
    reason: str = ""
    milliseconds: float | None = None
    p20: float | None = None
    p80: float | None = None
    timed_by: str = ""
    baseline: str = ""
    tax: float | None = None
    scores_per_second: float | None = None
    limit_fraction: float | None = None
    accurate: bool | None = None
    errors: str = ""
    bias_gradient: bool | None = None
    peak_mib: float | None = None
    first_call_seconds: float | None = None
    new_length_ms: float | None = None
    host_us: float | None = None
    device: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    cudnn: str = ""
    flashbias: str = ""
    commit: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """What a later measurement replaces."""
        return self.workload, self.mode, self.peer, self.n_q, self.n_k

    @property
    def target(self) -> Target | None:
        """Gate and goal of ours at the length and on the chip that they are for."""
        workload = BY_NAME.get(self.workload)
        if self.peer != OURS or workload is None or "H200" not in self.device:
            return None
        return workload.targets.get(self.mode) if (self.batch, self.n_k) == (workload.batch, workload.n_k) else None

    def meets(self, tax: float | None) -> bool | None:
        """Whether the row is at or below a tax; None without one. What is not accurate meets nothing."""
        if tax is None:
            return None
        # Taxes are quoted with two digits.
        return self.tax is not None and bool(self.accurate) and round(self.tax, 2) <= tax


def store(rows: Iterable[Row], path: Path) -> list[Row]:
    """Write rows into a CSV. Those that are there already stay, unless they are measured anew. Returns them all."""
    known = {row.key: row for row in load(path)} if path.exists() else {}
    known |= {row.key: row for row in rows}
    places = {name: i for i, name in enumerate(BY_NAME)}
    found = sorted(known.values(), key=lambda row: (places.get(row.workload, len(places)), row.n_k))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in found:
            writer.writerow({name: _text(value) for name, value in asdict(row).items()})
    return found


def load(path: Path) -> list[Row]:
    """Rows from a CSV."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(**{f.name: _value(line[f.name], str(f.type)) for f in fields(Row)}) for line in csv.DictReader(file)
        ]


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _value(text: str, kind: str) -> Any:
    if kind == "str":
        return text
    if text == "":
        return None
    if kind.startswith("bool"):
        return text == "True"
    return int(text) if kind == "int" else float(text)
