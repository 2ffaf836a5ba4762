"""The same work in several variants, each in a process of its own, measured in turn.

In turn, because another load on the machine then slows all of them alike; in processes of their own, because a patch
and memory that was freed would be seen by the other.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from .memory import held_memory, peak_memory

Work = Callable[[], Any]

_work: Work | None = None  # of a process that measures


@dataclass
class Measurement:
    """What the work returned, the median time of a call in seconds, the peak memory of a call in bytes.

    `held` are the bytes that were held already when the call began: the weights, and what is kept beside them.
    """

    result: Any
    seconds: float
    peak: int
    held: int = 0


def side_by_side(variants: Mapping[str, Callable[[], Work]], device: str, repeats: int) -> dict[str, Measurement]:
    """Measure several variants of a piece of work.

    `variants[name]()` is called once in the process of that variant, and returns the work: a function that is called
    `repeats + 1` times and returns when all its computation is done. Both, and the result, have to be picklable.
    """
    with ExitStack() as stack:
        spawn = multiprocessing.get_context("spawn")
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn)) for name in variants}
        for ready in [pools[name].submit(_prepare, variant) for name, variant in variants.items()]:
            ready.result()
        first = {name: pool.submit(_memory, device).result() for name, pool in pools.items()}
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(repeats):
            for name, pool in pools.items():
                seconds[name].append(pool.submit(_time).result())
    return {
        name: Measurement(result, statistics.median(seconds[name]), peak, held)
        for name, (result, peak, held) in first.items()
    }


def _prepare(variant: Callable[[], Work]) -> None:
    global _work
    _work = variant()


def _memory(device: str) -> tuple[Any, int, int]:
    assert _work is not None
    held = held_memory(device)
    return *peak_memory(_work, device), held


def _time() -> float:
    assert _work is not None
    started = time.perf_counter()
    _work()
    return time.perf_counter() - started
