"""`flashbias doctor`: what is installed here, what of it works together, and if not, why."""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
import warnings
from dataclasses import asdict
from typing import Any

from flashbias import __version__
from flashbias.integrations import available

from . import machine


def run(as_json: bool) -> None:
    """Print the report, as tables or as JSON. Checkouts are looked for in the current folder too."""
    sys.path.append(os.getcwd())
    report = examine()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)


def examine() -> dict[str, Any]:
    """All that the report says, as JSON can hold it."""
    import torch

    cards, obstacle = _gpus()
    return {
        "flashbias": __version__,
        "commit": machine.commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": machine.processor(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": machine.version("triton"),
        "driver": machine.driver(),
        "gpus": cards,
        "kernels": {"usable": obstacle is None, "reason": obstacle or ""},
        "environment": {name: os.environ[name] for name in sorted(os.environ) if _concerns_us(name)},
        "hosts": [host for name in available() for host in _hosts(name)],
    }


def _gpus() -> tuple[list[dict[str, Any]], str | None]:
    """The GPUs, and what stands in the way of the kernels there, None if they run."""
    import torch

    with warnings.catch_warnings(record=True) as said:  # torch warns where the driver does not fit
        warnings.simplefilter("always")
        cards = machine.gpus()
    if torch.version.cuda is None:
        return cards, "torch was built without CUDA; tensors on the CPU are served by the CPU path"
    if not cards:
        return cards, "; ".join(["torch sees no GPU", *(str(warning.message) for warning in said)])
    try:
        _try_kernel()
    except Exception as error:  # whatever it is, it is the answer
        return cards, f"{type(error).__name__}: {error}"
    return cards, None


def _try_kernel() -> None:
    """A small attention on the current GPU."""
    import torch

    from flashbias import ALiBi, biased_attention

    query = torch.ones(1, 16, 16, dtype=torch.float16, device="cuda")
    biased_attention(query, query, query, ALiBi(torch.ones(1, device="cuda")))
    torch.cuda.synchronize()


def _hosts(name: str) -> list[dict[str, Any]]:
    """The hosts of one integration."""
    try:
        states = importlib.import_module(available()[name]).INTEGRATION.status()
    except Exception as error:  # a report on all that is broken must not be broken by it
        return [{"integration": name, "ok": False, "reason": f"{type(error).__name__}: {error}"}]
    return [{"integration": name} | asdict(state) for state in states]


def _concerns_us(name: str) -> bool:
    return name.startswith("FLASHBIAS_") or name in ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    kernels = "run" if report["kernels"]["usable"] else f"cannot run: {report['kernels']['reason']}"
    table = Table(show_header=False, box=None)
    for label, value in (
        ("flashbias", f"{report['flashbias']} {report['commit']}"),
        ("Python", f"{report['python']}, {report['system']}"),
        ("processor", report["processor"]),
        ("torch", f"{report['torch']}, " + (f"CUDA {report['cuda']}" if report["cuda"] else "without CUDA")),
        ("triton", report["triton"] or "not installed"),
        ("driver", report["driver"] or "none"),
        *(
            ("GPU", f"{g['name']}, sm_{g['capability'].replace('.', '')}, {g['memory_gib']:.0f} GiB")
            for g in report["gpus"]
        ),
        ("kernels", kernels),
        *report["environment"].items(),
    ):
        table.add_row(f"[bold]{label}", escape(value.strip()))
    hosts = Table("patch", Column("host", overflow="fold"), "installed", "supported", "patched", "can be patched")
    reasons = []
    for host in report["hosts"]:
        name = host.get("host", "")
        hosts.add_row(
            host["integration"],
            name,
            host.get("installed") or "no",
            host.get("supported") or "any",
            "yes" if host.get("patched") else "no",
            "yes" if host["ok"] else "no, see below",
        )
        if not host["ok"]:
            reasons.append(f"{host['integration']}, {name}: {host['reason']}")
    console = Console()
    console.print(table, hosts, *map(escape, reasons), sep="\n")
