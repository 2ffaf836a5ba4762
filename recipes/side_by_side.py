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
from typing import Any, TypeVar

from .memory import held_memory, peak_memory

Work = Callable[[], Any]
Self = TypeVar("Self", bound="SideBySide")

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


@dataclass
class Noted:
    """Work, and what there is to say of it."""

    work: Work
    notes: Any

    def __call__(self) -> Any:
        return self.work()


class SideBySide:
    """Variants of a piece of work, each preparing in a process of its own from now on; to be used in a `with`.

    `variants[name]()` is called once in the process of that variant, and returns the work: a function that is called
    `repeats + 1` times and returns when all its computation is done. Both, and the result, have to be picklable.
    The notes of a `Noted` work are in `notes[name]` when it is ready.
    Where a variant fails that is raised, or, where `failures` is given, put there, and the others go on.
    """

    def __init__(
        self, variants: Mapping[str, Callable[[], Work]], device: str, failures: dict[str, Exception] | None = None
    ) -> None:
        self.notes: dict[str, Any] = {}
        self._device, self._failures, self._stack = device, failures, ExitStack()
        spawn = multiprocessing.get_context("spawn")
        self._pools = {name: self._stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn)) for name in variants}
        self._all = list(self._pools.values())
        self._preparing = {name: pool.submit(_prepare, variants[name]) for name, pool in self._pools.items()}

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.end()
        self._stack.close()

    def end(self) -> None:
        """Have the processes end, all together: one that used a GPU takes seconds for it."""
        for pool in self._all:
            pool.shutdown(wait=False, cancel_futures=True)

    def wait(self) -> None:
        """Return when all have prepared."""
        self.notes |= self._collect(self._preparing)
        self._preparing = {}

    def measure(self, repeats: int) -> dict[str, Measurement]:
        """Wait, and measure them in turn."""
        self.wait()
        first: dict[str, Any] = {}
        for name, pool in list(self._pools.items()):
            first |= self._collect({name: pool.submit(_memory, self._device)})
        seconds: dict[str, list[float]] = {name: [] for name in self._pools}
        for _ in range(repeats):
            for name, pool in list(self._pools.items()):
                seconds[name] += self._collect({name: pool.submit(_time)}).values()
        return {
            name: Measurement(result, min(seconds[name]), peak, held)
            for name, (result, peak, held) in first.items()
            if name in self._pools
        }

    def _collect(self, futures: Mapping[str, Future[Any]]) -> dict[str, Any]:
        results = {}
        for name, future in futures.items():
            try:
                results[name] = future.result()
            except Exception as error:
                if self._failures is None:
                    raise
                self._failures[name] = error
                del self._pools[name]
        return results


def _prepare(variant: Callable[[], Work]) -> Any:
    global _work
    _work = variant()
    return _work.notes if isinstance(_work, Noted) else None


def _memory(device: str) -> tuple[Any, int, int]:
    assert _work is not None
    held = held_memory(device)
    return *peak_memory(_work, device), held


def _time() -> float:
    assert _work is not None
    started = time.perf_counter()
    _work()
    return time.perf_counter() - started
