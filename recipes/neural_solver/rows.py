"""Results that are written as they come."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashbias.recipes.machine import conditions


class Rows:
    """A CSV with the conditions in every row, complete after each `add`. Rows of an earlier run stay beside them.

    A row takes the place of one that has the same values under `key`.
    """

    def __init__(self, path: Path, key: Sequence[str], device: str) -> None:
        self.path, self.key, self._conditions = path, tuple(key), conditions(device)
        self._rows = load(path) if path.exists() else []
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: dict[str, Any]) -> None:
        """Write one more row."""
        written = {name: _text(value) for name, value in {**row, **self._conditions}.items()}
        same = tuple(written[name] for name in self.key)
        self._rows = [r for r in self._rows if tuple(r.get(name, "") for name in self.key) != same] + [written]
        names = dict.fromkeys(name for r in self._rows for name in r)
        with self.path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(names), restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(self._rows)


def load(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def like_the_last(rows: Sequence[dict[str, str]], names: Sequence[str]) -> list[dict[str, str]]:
    """Those rows that agree with the last one, which is the latest, in some columns."""
    return [row for row in rows if all(row[name] == rows[-1][name] for name in names)]


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)
