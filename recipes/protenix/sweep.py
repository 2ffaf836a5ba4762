"""Protenix over numbers of tokens: triangle attention, alone and as a module, a block of the Pairformer, a whole run.

Every row has its check: `error` of the parts is the largest difference to the torch kernel in fp32, relative to the
largest entry; of whole runs it is the coordinates' RMSD to the run of the first kernel, in ångström.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .report import Request
from .triangle import chunk_size
from .whole import NO_BIAS, OURS, PACKAGES, Variant, absent, computed_by, differences, run

PARTS = ("triangle", "block", "run")
REPEATS = 3


def sweep(
    request: Request, tokens: Sequence[int], parts: Sequence[str], path: Path, wanted: Sequence[str] = tuple(PACKAGES)
) -> list[dict[str, Any]]:
    """Rows for every part, number of tokens and kernel, stored part by part; draws them beside the CSV.

    `wanted` are those of Protenix' kernels that are measured, if they can run here; ours is always.
    """
    import torch
    from rich.console import Console

    from flashbias.recipes.machine import choose_device, conditions, write_rows

    from . import host, triangle
    from .figures import draw_sweep

    device = choose_device(request.device)
    console, rows = Console(stderr=True), []
    names = [name for name in wanted if absent(name, device) is None]
    path.parent.mkdir(parents=True, exist_ok=True)
    with host.stand_ins():
        built = host.build(device, request.checkpoint, request.blocks) if {"block", "run"} & set(parts) else None
        importlib.import_module("protenix.model.triangular.triangular")

    def one(part: str, n: int) -> list[dict[str, Any]]:
        if part == "triangle":
            with torch.no_grad():
                return [{**row, "status": "ok"} for row in triangle.measure(n, device, REPEATS, names)]
        return block(built, n, device, names) if part == "block" else whole_runs(built, request, n, device, names)

    for n in tokens:
        for part in parts:
            try:
                with console.status(f"{part}, {n} tokens"):
                    made = one(part, n)
            except Exception as error:
                made = [_row(n, part, "all", status=f"failed: {type(error).__name__}: {error}"[:200])]
            rows += [_row(**row) for row in made]
            write_rows(path, rows, device)
            if device != "cpu":
                torch.cuda.empty_cache()
        if any(row["ms"] != "" for row in rows):
            draw_sweep(path.with_suffix(".png"), rows, conditions(device))
    return rows


def block(built: Any, tokens: int, device: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """The first block of the Pairformer under autocast to bf16, by those of Protenix' kernels and by ours."""
    import torch

    from flashbias.recipes.bench.timing import time_all
    from flashbias.recipes.memory import peak_memory

    module = built.model.pairformer_stack.blocks[0]
    torch.manual_seed(tokens)
    s = torch.randn(tokens, module.c_s, device=device)
    z = torch.randn(tokens, tokens, module.tri_att_start.c_in, device=device)
    chunk = chunk_size(tokens)

    def step(half: bool = True) -> Callable[[], Any]:
        # In place, as in a run, and so on a copy.
        pair = z.bfloat16() if half else z
        autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half)

        def call() -> Any:
            with torch.no_grad(), autocast:
                return module(
                    s,
                    pair.clone(),
                    None,
                    built.configs.triangle_multiplicative,
                    built.configs.triangle_attention,
                    inplace_safe=True,
                    chunk_size=chunk,
                )[1]

        return call

    with computed_by(Variant("torch", "fp32", tf32=False), built, device):
        oracle = step(half=False)()
    rows = []
    for kernel in (*names, NO_BIAS, OURS):
        try:
            with computed_by(Variant(kernel), built, device):
                work = step()
                work()
                made, memory = peak_memory(work, device)
                timing = time_all({kernel: work}, device, REPEATS, lambda name: None)[kernel]
        except Exception as failure:
            rows.append(_row(tokens, "block", kernel, status=f"failed: {type(failure).__name__}: {failure}"[:200]))
            continue
        error = ((made.float() - oracle).abs().max() / oracle.abs().max()).item()
        rows.append(
            _row(tokens, "block", kernel, chunk or tokens, timing.median, timing.p20, timing.p80, timing.by, error,
                 memory / 2**20)
        )  # fmt: skip
        del made
    return rows


def whole_runs(built: Any, request: Request, tokens: int, device: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """A whole run by those of Protenix' kernels and by ours; what a first call costs is left out."""
    from . import features

    target = features.load(request.features, tokens)
    rows, reference = [], None
    for kernel in (*names, OURS):
        try:
            if request.warm and device != "cpu":
                run(built, target, Variant(kernel), type(request.size)(1, 2, request.size.samples), device)
            outcome = run(built, target, Variant(kernel), request.size, device)
        except Exception as error:
            rows.append(_row(tokens, "run", kernel, status=f"failed: {type(error).__name__}: {error}"[:200]))
            continue
        reference = reference or outcome
        rmsd = differences(outcome, reference)["rmsd_mean"]
        rows.append(
            _row(tokens, "run", kernel, chunk_size(tokens) or tokens, 1e3 * outcome.seconds["total"], by="clock",
                 error=rmsd, peak_mib=outcome.peak_bytes / 2**20)
        )  # fmt: skip
    return rows


def _row(
    tokens: int,
    part: str,
    kernel: str,
    chunk: Any = "",
    ms: Any = "",
    p20: Any = "",
    p80: Any = "",
    by: str = "",
    error: Any = "",
    peak_mib: Any = "",
    status: str = "ok",
) -> dict[str, Any]:
    """Of the result; empty where nothing was measured."""
    return dict(locals())
