"""What the recipes on whole models share: random weights, times, memory given back, rows that a cut run leaves."""

from __future__ import annotations

import csv
import gc
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flashbias.errors import FlashBiasError


def choose(names: Sequence[str], known: Sequence[str], path: Path | None) -> list[str]:
    """The models that `--model` names, between commas or one by one; all but the tiny ones where it names none.

    Raises:
        FlashBiasError: for a name that is not known, or several with one path of weights.
    """
    names = [word for name in names for word in name.split(",")] or [n for n in known if not n.startswith("tiny")]
    if any(name not in known for name in names) or (path is not None and len(names) > 1):
        raise FlashBiasError(f"--model {','.join(names)}", "one of " + ", ".join(known), "with --path name one model")
    return names


def row_store(
    name: str, device: str, out: Path | None, by: Sequence[str] = ("model",)
) -> Callable[[dict[str, Any]], None]:
    """A function that writes a row to a CSV, at once, with what it was measured on.

    In the folder `out`, or where results of that device are kept. Rows of earlier runs stay, but those that agree with
    a new one in the columns `by`. The first row's names are the header.
    """
    from flashbias.recipes import machine

    folder = out or Path("recipes", "results", machine.folder_name(device))
    folder.mkdir(parents=True, exist_ok=True)
    path, part = folder / name, folder / f"{name}.{os.getpid()}"
    conditions = machine.conditions(device) | {"transformers": machine.version("transformers")}
    rows: list[dict[str, Any]] = []

    def subject(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row.get(column, "")) for column in by)

    def store(row: dict[str, Any]) -> None:
        rows.append(row | conditions)
        others: list[dict[str, Any]] = []
        if path.exists():  # read each time: runs of other models may go on beside this one
            with path.open(newline="", encoding="utf-8") as file:
                others += csv.DictReader(file)
        own = {subject(row) for row in rows}
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], restval="", extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows([other for other in others if subject(other) not in own] + rows)
        part.replace(path)  # a run that is cut leaves the file as it was before or after this row

    return store


def random_model(cls: Any, config: Any, device: str, dtype: Any) -> Any:
    """A model of transformers with random weights, drawn on the device and in the dtype: no other copy is made."""
    import torch

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return cls(config)
    finally:
        torch.set_default_dtype(before)


def milliseconds(work: Callable[[], object], device: str) -> float:
    import time

    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) * 1e3


def free(device: str) -> None:
    import torch

    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def reason(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}".splitlines()[0][:160]
