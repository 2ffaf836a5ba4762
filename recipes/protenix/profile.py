"""Where the time of a stage goes, by families of kernels, stock and patched: what is left to be made faster."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .report import Request, prepare
from .whole import Size, Variant, absent, run

# Of kernels on a GPU, of operators on a CPU: the first whose pattern is in a name.
FAMILIES = {
    "attention": r"attention|attn|flash|fmha|sdpa|softmax|forward_kernel|forward_teams|combine_kernel",
    "products": r"gemm|gemv|nvjet|cutlass|cublas|xmma|matmul|linear|mm\b|splitkreduce|triangle_mul|einsum",
    "norms": r"norm(?!al)",
    "copies": r"copy|memcpy|memset|cat|gather|scatter|index|halves_kernel|rows_kernel|fill",
    "elementwise": r"elementwise|reduce|gate_kernel|most_kernel|aten::",
}
OTHERS = "others"


def family(name: str) -> str:
    """That of a kernel or operator."""
    return next((found for found, names in FAMILIES.items() if re.search(names, name.lower())), OTHERS)


def units(size: Size) -> dict[str, int]:
    """Of what a stage's times are told: cycles of the trunk, steps of the diffusion, the confidence head as a whole."""
    return {"trunk": size.cycles, "diffusion": size.steps, "confidence": 1}


def profile(request: Request, stages: Sequence[str], kernels: Sequence[str], path: Path) -> list[dict[str, Any]]:
    """Rows for each stage, kernel and family, written to `path`, and a picture beside it.

    A whole run is timed, then another one is profiled: a profiler slows the host down, not the kernels.
    """
    from flashbias.recipes.machine import conditions, write_rows

    from .figures import draw_profile

    device, console, target, built = prepare(request)
    common = {"tokens": len(target["token_index"]), **vars(request.size), "blocks": request.blocks or "all"}
    rows: list[dict[str, Any]] = []
    request.out.mkdir(parents=True, exist_ok=True)
    for kernel in kernels:
        reason = absent(kernel, device)
        if reason is not None:
            console.print(f"{kernel}: {reason}", markup=False)
            continue
        variant, spent = Variant(kernel), Spent(stages, device)
        with console.status(f"running {kernel}"):
            if request.warm and device != "cpu":
                run(built, target, variant, Size(1, 2, request.size.samples), device)
            seconds = run(built, target, variant, request.size, device).seconds
            run(built, target, variant, request.size, device, spent.watch)
        for stage in stages:
            number = units(request.size)[stage]
            row = {"stage": stage, "kernel": kernel, "clock_ms": round(1e3 * seconds[stage] / number, 4)}
            rows += [row | found | common for found in spent.rows(stage, number)]
        write_rows(path, rows, device)
    if rows:
        draw_profile(path.with_suffix(".png"), rows, conditions(device))
    return rows


class Spent:
    """The microseconds and launches of each kernel, or operator on a CPU, in some stages of a run."""

    def __init__(self, stages: Iterable[str], device: str) -> None:
        self.device = device
        self.found: dict[str, dict[str, tuple[float, int]]] = {stage: {} for stage in stages}

    @contextlib.contextmanager
    def watch(self, stage: str) -> Iterator[None]:
        """Inside, what runs is counted for the stage, if it is one of those."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        if stage not in self.found:
            yield
            return
        on_gpu = self.device != "cpu"
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as watched:
            yield
        for event in watched.key_averages():
            if on_gpu and event.device_type != DeviceType.CUDA:
                continue
            time, count = self.found[stage].get(event.key, (0.0, 0))
            time += event.self_device_time_total if on_gpu else event.self_cpu_time_total
            self.found[stage][event.key] = time, count + event.count

    def rows(self, stage: str, number: int) -> Iterator[dict[str, Any]]:
        """Milliseconds and launches of each family in one of `number` equal parts of a stage, its longest kernel."""
        total = sum(time for time, _ in self.found[stage].values())
        for name in (*FAMILIES, OTHERS):
            members = {key: spent for key, spent in self.found[stage].items() if family(key) == name}
            time, count = (sum(values) for values in zip(*members.values(), strict=True)) if members else (0.0, 0)
            yield {
                "family": name,
                "ms": round(time / number / 1e3, 4),
                "share": round(time / total, 4) if total else "",
                "launches": round(count / number, 1),
                "longest": max(members, key=lambda key: members[key][0])[:80] if members else "",
            }


def as_table(rows: Sequence[dict[str, Any]]) -> Any:
    """For the terminal: milliseconds and launches by stage and kernel."""
    from rich.table import Column, Table

    names = (*FAMILIES, OTHERS)
    made = Table("stage", "kernel", *(Column(name, justify="right") for name in (*names, "sum", "clock")),
                 title="milliseconds (launches) of a cycle, a step, the confidence head")  # fmt: skip
    for stage, kernel in dict.fromkeys((row["stage"], row["kernel"]) for row in rows):
        some = [row for row in rows if (row["stage"], row["kernel"]) == (stage, kernel)]
        cells = [f"{row['ms']:.2f} ({row['launches']:.0f})" for row in some]
        made.add_row(stage, kernel, *cells, f"{sum(row['ms'] for row in some):.2f}", f"{some[0]['clock_ms']:.2f}")
    return made
