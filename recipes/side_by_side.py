"""The same work in several variants, each in a process of its own, measured in turn.

In turn, because another load on the machine then slows all of them alike; in processes of their own, because a patch
and memory that was freed would be seen by the other.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from .memory import held_memory, peak_memory

Work = Callable[[], Any]

_work: Work | None = None  # of a process that measures


@dataclass
class Measurement:
    """What the work returned, the time of the fastest call in seconds, the peak memory of a call in bytes.

    `held` are the bytes that were held already when the call began: the weights, and what is kept beside them.
    """

    result: Any
    seconds: float
    peak: int
    held: int = 0


def side_by_side(
    variants: Mapping[str, Callable[[], Work]],
    device: str,
    repeats: int,
    on_step: Callable[[], Any] = lambda: None,
    failures: dict[str, Exception] | None = None,
) -> dict[str, Measurement]:
    """Measure several variants of a piece of work.

    `variants[name]()` is called once in the process of that variant, and returns the work: a function that is called
    `repeats + 1` times and returns when all its computation is done. Both, and the result, have to be picklable.
    `on_step` is called `steps(variants, repeats)` times in all. Where a variant fails that is raised, or, where
    `failures` is given, put there, and the others go on.
    """
    with ExitStack() as stack:
        spawn = multiprocessing.get_context("spawn")
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn)) for name in variants}

        def collect(futures: dict[str, Future[Any]]) -> dict[str, Any]:
            results = {}
            for name, future in futures.items():
                try:
                    results[name] = future.result()
                except Exception as error:
                    if failures is None:
                        raise
                    failures[name] = error
                    del pools[name]
                on_step()
            return results

        collect({name: pool.submit(_prepare, variants[name]) for name, pool in pools.items()})
        first: dict[str, Any] = {}
        for name, pool in list(pools.items()):
            first |= collect({name: pool.submit(_memory, device)})
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(repeats):
            for name, pool in list(pools.items()):
                seconds[name] += collect({name: pool.submit(_time)}).values()
    return {
        name: Measurement(result, min(seconds[name]), peak, held)
        for name, (result, peak, held) in first.items()
        if name in pools
    }


def steps(variants: Mapping[str, Any], repeats: int) -> int:
    """How many steps a measurement has that fails nowhere."""
    return len(variants) * (2 + repeats)


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
