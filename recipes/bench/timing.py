"""How calls are timed: side by side, with cold caches, and without the host where a kernel is short."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Step = Callable[[], object]

SHORT = 0.3  # milliseconds: from here on the host is as slow as the GPU, and CUDA graphs are replayed
ROUND = 50  # milliseconds for which a peer is measured before it is the next one's turn
CALLS = 5  # in a round, at least
HOST_CALLS = 20


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call: median, quantiles, and how they were measured ("events", "graph" or "clock")."""

    median: float
    p20: float
    p80: float
    by: str


def time_all(steps: dict[str, Step], device: str, repeats: int, say: Callable[[str], None]) -> dict[str, Timing]:
    """Times of all steps, measured in turn: `repeats` rounds in each of which everyone is measured once.

    On a GPU by `triton.testing.do_bench`, which empties the L2 cache before every call. If one of the steps is short,
    all are replayed as CUDA graphs, but for those that cannot be captured. `say` is told whose turn it is.
    """
    if not device.startswith("cuda"):
        samples: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(max(repeats, 3)):
            for name, step in steps.items():
                say(name)
                samples[name].append(_clock(step))
        return {name: _summary(times, "clock") for name, times in samples.items()}
    from triton.testing import do_bench

    steps, estimates = dict(steps), {}
    for name, step in steps.items():
        say(name)
        estimates[name] = do_bench(step, warmup=1, rep=1, return_mode="median")
    by = dict.fromkeys(steps, "events")
    if min(estimates.values()) < SHORT:
        for name, step in tuple(steps.items()):
            say(name)
            graph = capture(step)
            if graph is not None:
                steps[name], by[name] = graph.replay, "graph"
    samples = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            say(name)
            length = max(ROUND, round(CALLS * estimates[name]))
            samples[name] += do_bench(step, warmup=10, rep=length, return_mode="all")
    return {name: _summary(times, by[name]) for name, times in samples.items()}


def capture(step: Step) -> torch.cuda.CUDAGraph | None:
    """The step as a CUDA graph, or None where it cannot be one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with uncollected(), torch.cuda.graph(graph):  # a kernel that is collected meanwhile would unload its module
            step()
    except RuntimeError:
        return None
    return graph


@contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's garbage collector, which has been at work before."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def host_microseconds(step: Step, device: str) -> float | None:
    """Median time that an eager call takes on the host, the GPU left to itself; None on a CPU."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.synchronize()
    times = []
    for _ in range(HOST_CALLS):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    torch.cuda.synchronize()
    return statistics.median(times) * 1e6


def _clock(step: Step) -> float:
    started = time.perf_counter()
    step()
    return (time.perf_counter() - started) * 1e3


def _summary(times: list[float], by: str) -> Timing:
    p20, p80 = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.8], dtype=torch.float64)).tolist()
    return Timing(statistics.median(times), p20, p80, by)
