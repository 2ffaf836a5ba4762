"""`flashbias bench`: from what is asked for to tables, CSV and figures.

Measuring is done by other processes. First calls have one each, with empty caches, several at a time. What they
compiled is handed to the process that then measures all groups of peers, one after the other. Peers that might end it
are measured by further processes, one after the other too.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from flashbias.recipes import machine

from .measure import Group, Settings, conditions, first_call, measure
from .peers import BenchError, choose, registry
from .processes import stream
from .results import Row, load, store
from .workloads import BY_NAME, MODES, WORKLOADS

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SILENCE = 300.0  # seconds without a sign of life after which a process is given up
RESULTS = Path("recipes", "results")  # below the current folder, in one of the device's name
SIZES = ("full", "small")
FirstCalls = dict[tuple[str, str, str, int], dict[str, float]]


@dataclass(frozen=True)
class Request:
    """What a person asks for; what is empty means the default."""

    workloads: Sequence[str] = ()
    peers: Sequence[str] = ()
    modes: Sequence[str] = ()
    device: str = "auto"
    sizes: str = ""
    lengths: str = ""
    repeats: int = 3
    seed: int = 0
    warm: int | None = None
    out: Path | None = None
    repo: Path | None = None


def run(request: Request) -> int:
    """Measure, store, print; returns the exit code, 0 if ours was right wherever it was measured.

    Raises `BenchError` for what there is not.
    """
    from rich.console import Console
    from rich.progress import Progress

    from .figures import draw
    from .report import line, summary, table, wrong

    device = _device(request.device)
    settings = Settings(device, request.repeats, request.seed, request.repo)
    sizes = _one_of(SIZES, request.sizes or ("full" if device.startswith("cuda") else "small"), "--sizes")
    groups = plan(request, device, sizes)
    warm = request.warm
    if warm is None:
        warm = min(8, max((os.cpu_count() or 1) // 8, 1)) if device.startswith("cuda") and not request.lengths else 0
    out = request.out or RESULTS / machine.folder_name(device)
    stem = "bench" + ("_small" if sizes == "small" else "") + ("_sweep" if request.lengths else "")
    rows: list[Row] = []
    with TemporaryDirectory(prefix="flashbias-bench-") as folder, Progress(console=Console(stderr=True)) as progress:
        first = _first_calls(groups, settings, warm, Path(folder), progress) if warm else {}
        for found in _measure(groups, settings, Path(folder), progress):
            for row in found:
                for name, value in first.get((row.workload, row.mode, row.peer, row.n_k), {}).items():
                    setattr(row, name, value)
                progress.console.print(line(row))
                store([row], out / f"{stem}_{row.mode}.csv")  # now: a run that is stopped leaves what it has measured
            rows += found
    order = {key: i for i, key in enumerate(dict.fromkeys((g.mode, g.workload.name, g.workload.n_k) for g in groups))}
    rows.sort(key=lambda row: order[row.mode, row.workload, row.n_k])
    console, files = Console(width=None if Console().is_terminal else 200), []
    for mode in dict.fromkeys(row.mode for row in rows):
        path = out / f"{stem}_{mode}.csv"
        draw(load(path), mode, path.with_suffix(".png"))
        files += [path, path.with_suffix(".png")]
        console.print(table(rows, mode))
    print(json.dumps(summary(rows, files)), flush=True)
    return 1 if wrong(rows) else 0


def redraw(request: Request) -> list[Path]:
    """Draw the figures of a folder anew from the results that are stored there."""
    from .figures import draw

    folder = request.out or RESULTS / machine.folder_name(_device(request.device))
    files = sorted(folder.glob("bench*.csv"))
    if not files:
        raise BenchError(f"no results in {folder}", "a folder that holds bench_fwd.csv or the like", "name it by --out")
    for path in files:
        rows = load(path)
        draw(rows, rows[0].mode, path.with_suffix(".png"))
    return [path.with_suffix(".png") for path in files]


def listing(request: Request) -> None:
    """Print the workloads with their gates and goals, and the peers with what they lack here."""
    from rich.console import Console
    from rich.table import Table

    device = _device(request.device)
    workloads = Table("workload", "what", "B, H, Nq, Nk, C, R", "gates / goals", title="workloads")
    for w in WORKLOADS:
        targets = ", ".join(f"{mode} {t.gate:.2f} / {t.goal:.2f}" for mode, t in w.targets.items())
        shape = ", ".join(map(str, (w.batch, w.heads, w.n_q, w.n_k, w.head_dim, w.rank)))
        workloads.add_row(w.name, w.title, shape, targets)
    peers = Table("peer", f"on {device}", title="peers (groups: best, safe, all)")
    for name, peer in registry(request.repo).items():
        peers.add_row(name, peer.absent(device) or ("in a process of its own" if peer.isolated else "there"))
    console = Console(width=None if Console().is_terminal else 160)
    console.print(workloads)
    console.print(peers)


def plan(request: Request, device: str, sizes: str) -> list[Group]:
    """Who is measured together: all peers that one process bears, and each of the others alone."""
    peers = registry(request.repo)
    names = _words(request.workloads) or list(BY_NAME)
    workloads = [BY_NAME[_one_of(BY_NAME, name, "--workload")] for name in names]
    if sizes == "small":
        workloads = [workload.small() for workload in workloads]
    if request.lengths:
        lengths = sorted({_length(word) for word in _words([request.lengths])})
        workloads = [workload.at(length) for workload in workloads for length in lengths]
    groups = []
    for mode in [_one_of(MODES, mode, "--mode") for mode in _words(request.modes)] or MODES:
        for workload in workloads:
            if mode not in workload.modes:
                continue
            chosen = choose(_words(request.peers) or ["best"], workload, device, peers)
            alone = [name for name in chosen if peers[name].isolated and not peers[name].absent(device)]
            together = tuple(name for name in chosen if name not in alone)
            groups += [Group(workload, mode, together)] if together else []
            groups += [Group(workload, mode, (name,), alone=True) for name in alone]
    if not groups:
        raise BenchError("nothing to measure", "a mode that a workload has", "decoding has no way back: use --mode fwd")
    return groups


def _first_calls(groups: list[Group], settings: Settings, count: int, folder: Path, progress: Progress) -> FirstCalls:
    """First calls of all that compiles, `count` processes at a time. Their caches end up in that of `_measure`."""
    peers = registry(settings.repo)
    tasks = [
        (group.workload, group.mode, name)
        for group in groups
        for name in group.peers
        if not group.alone and peers[name].compiles and not peers[name].absent(settings.device)
    ]
    bar = progress.add_task(f"first calls, {count} at a time", total=len(tasks))
    found: FirstCalls = {}

    def call(number: int) -> dict[str, float]:
        environment = _environment(folder / f"first{number}") | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
        result: dict[str, float] = {}
        # What dies here dies again where it is measured, and is reported there.
        for kind, value in stream(partial(first_call, settings), [tasks[number]], environment, SILENCE):
            result = value if kind == "done" else result
        progress.advance(bar)
        return result

    with ThreadPoolExecutor(count) as pool:
        for (workload, mode, name), result in zip(tasks, pool.map(call, range(len(tasks))), strict=True):
            found[workload.name, mode, name, workload.n_k] = result
    for number in range(len(tasks)):
        for cache in (folder / f"first{number}").glob("*"):
            shutil.copytree(cache, folder / "shared" / cache.name, dirs_exist_ok=True)
    return found


def _measure(groups: list[Group], settings: Settings, folder: Path, progress: Progress) -> Iterator[list[Row]]:
    """Rows of all groups, those of peers that are alone last."""
    bar = progress.add_task("measuring", total=sum(len(group.peers) for group in groups))
    together = [group for group in groups if not group.alone]
    if together:
        yield from _survive(together, settings, _environment(folder / "shared"), progress, bar)
    for number, group in enumerate(group for group in groups if group.alone):
        yield from _survive([group], settings, _environment(folder / f"alone{number}"), progress, bar)


def _survive(
    groups: list[Group], settings: Settings, environment: dict[str, str], progress: Progress, bar: TaskID
) -> Iterator[list[Row]]:
    """Rows of groups that share a process. Where it dies, a new one goes on without the peer that was at work."""
    todo = deque(groups)
    while todo:
        doing = ""
        for kind, value in stream(partial(measure, settings), list(todo), environment, SILENCE):
            group = todo[0]
            if kind == "doing":
                doing = value
                progress.update(bar, description=f"{group.workload.name} {group.mode} N {group.workload.n_k}: {doing}")
                continue
            todo.popleft()
            if kind == "done":
                doing = ""
                progress.advance(bar, len(group.peers))
                yield value
                continue
            rest = group.without(doing)
            if doing in registry(settings.repo) and rest.peers:
                todo.appendleft(rest)
            else:
                rest = replace(group, peers=())
            lost = [name for name in group.peers if name not in rest.peers]
            reason = f"{doing or 'before the first peer'}: {value}"
            progress.advance(bar, len(lost))
            yield [group.row(name, status="failed", reason=reason, **conditions(settings.device)) for name in lost]


def _environment(caches: Path) -> dict[str, str]:
    """Of a process that measures, with caches of its own for what is compiled."""
    return {
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it cuBLAS refuses under torch's deterministic switch
    }


def _device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise BenchError(f"--device {device}", "cpu, cuda or cuda:N", "choose one of these")
    if kind == "cuda" and not torch.cuda.is_available():
        raise BenchError(f"--device {device}, and torch sees no GPU", "a GPU", "use --device cpu")
    return device


def _one_of(known: Iterable[str], name: str, option: str) -> str:
    if name not in known:
        raise BenchError(f"{option} {name}", "one of " + ", ".join(known), "see flashbias bench --list")
    return name


def _length(word: str) -> int:
    if not word.isdecimal() or int(word) < 2:
        raise BenchError(f"--lengths {word}", "whole numbers from 2, by commas", "--lengths 1024,2048")
    return int(word)


def _words(values: Iterable[str]) -> list[str]:
    """Values that were repeated, or joined by commas."""
    return [word for value in values for word in value.split(",") if word]
