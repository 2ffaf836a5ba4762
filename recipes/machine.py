"""What a recipe runs on: for `flashbias doctor`, and for the rows of its results."""

from __future__ import annotations

import csv
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from flashbias import __version__
from flashbias.errors import DeviceError


def choose_device(wanted: str) -> str:
    """`"cpu"`, `"cuda"` or `"cuda:N"`; of `"auto"` the first GPU, or `"cpu"` without one.

    Raises `DeviceError` for another name and for a GPU that is not there.
    """
    there = len(gpus())
    if wanted == "auto":
        return "cuda" if there else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", wanted):
        raise DeviceError(f"--device {wanted}", "cpu, cuda or cuda:N", "choose one of these")
    if wanted != "cpu" and _index(wanted) >= there:
        raise DeviceError(f"--device {wanted}, and torch sees {there or 'no'} GPU", "a GPU", "use --device cpu")
    return wanted


def conditions(device: str) -> dict[str, Any]:
    """What every row of a result names: the device, driver, torch, triton, flashbias and its commit."""
    return {
        "device": gpus()[_index(device)]["name"] if device.startswith("cuda") else processor(),
        "driver": driver() or "",
        "torch": version("torch"),
        "triton": version("triton"),
        "flashbias": __version__,
        "commit": commit(),
    }


def folder_name(device: str) -> str:
    """Under which name results are kept: `"nvidia-h200"` for a GPU of that name, `"cpu"`."""
    name = gpus()[_index(device)]["name"] if device.startswith("cuda") else "cpu"
    return re.sub(r"\W+", "-", name.lower())


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], device: str) -> None:
    """A result as CSV: rows of the same columns, and the conditions in each."""
    rows = [{**row, **conditions(device)} for row in rows]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def gpus() -> list[dict[str, Any]]:
    """Name, compute capability and memory of every GPU that torch sees; none where torch or its CUDA is absent."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [{"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_gib": p.total_memory / 2**30} for p in found]


def driver() -> str | None:
    """The version of NVIDIA's driver, None where there is none."""
    kernel_module = Path("/proc/driver/nvidia/version")
    if kernel_module.exists():
        text = kernel_module.read_text()
    else:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            text = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            return None
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found.group() if found else None


def version(distribution: str) -> str:
    """The installed version, empty where there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def processor() -> str:
    """The processor's name and how many of its cores this process may use."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return f"{named.group(1) if named else platform.processor() or platform.machine()}, {cores()} cores"


def cores() -> int:
    """How many of the processor's cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str:
    """The commit of the checkout that the package is installed from, `+` if it was changed since.

    A copy without a history names it in the environment variable `FLASHBIAS_COMMIT`.
    """
    folder = Path(__file__).parents[1]
    if not (folder / ".git").exists():  # or the answer could be of a repository that has a virtual environment inside
        return os.environ.get("FLASHBIAS_COMMIT", "")
    command = ["git", "describe", "--always", "--abbrev=7", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("FLASHBIAS_COMMIT", "")
    return done.stdout.strip()


def _index(device: str) -> int:
    return int(device.partition(":")[2] or 0)
