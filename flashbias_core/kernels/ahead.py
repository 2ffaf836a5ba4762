"""Kernels that a pass needs and that are not compiled yet are compiled beside each other, before it launches the first.

To find them the pass is made once more, and with it the one that follows: of tensors without memory, and what would be
launched is compiled in a thread. What fails in this is left to the pass itself, which fails in the same way.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from . import replay
from .passes import Recorder
from .setting import Setting

# Seconds for which a thread may keep Python's interpreter: as long as to trace a kernel takes. Threads that take it
# from each other every few milliseconds take longer, all of them. Other threads of the process wait for it, too.
TURN = 0.5
_turns = Setting(sys.getswitchinterval, sys.setswitchinterval, TURN)


class Survey(Recorder):
    """That of passes which are not made: threads compile what they would launch.

    made: what torch has made so far in the pass that is surveyed. It makes no more than kernels read: its first sum or
    product without memory takes it up to a second.
    """

    def __init__(self, device: torch.device, threads: Executor, made: Iterator[Tensor]) -> None:
        super().__init__(())
        self.device, self.threads, self.made = device, threads, made
        self.found: set[Hashable] = set()

    def compile(
        self, key: Hashable, kernel: Any, arguments: dict[str, Any], keep: Callable[[CompiledKernel], Any]
    ) -> None:
        """Start to compile a kernel for these arguments, of which the key says all that matters, if not done yet."""
        if key not in self.found:
            self.found.add(key)
            _ = kernel.cache_key  # that of its files: it depends on the order in which kernels are asked for theirs
            self.threads.submit(_compile, self.device, kernel, arguments, keep)

    def room(self, make: Callable[..., Tensor], arguments: tuple[Any, ...], *, zeros: bool) -> Tensor:
        return make(*map(_without_memory, arguments))

    def do(self, function: Callable[..., Tensor], arguments: tuple[Any, ...], *, is_read: bool = True) -> Tensor:
        made = next(self.made, None)
        if made is None:
            made = self.room(function, arguments, zeros=False) if is_read else arguments[0]
        return made


def _without_memory(value: Any) -> Any:
    """A tensor that lies as another does; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def is_surveying() -> bool:
    """Whether this thread makes a pass only to find its kernels."""
    return isinstance(replay.recorder(), Survey)


def survey(key: Hashable, kernel: Any, arguments: dict[str, Any], keep: Callable[[CompiledKernel], Any]) -> None:
    """Have a kernel compiled for these arguments, constants among them, by a thread, which gives it to `keep`."""
    found = replay.recorder()
    assert isinstance(found, Survey)
    found.compile(key, kernel, arguments, keep)


def compile_missing() -> None:
    """Compile the kernels of the pass that this thread makes and of the one after it, where threads can."""
    recorder = replay.recorder()
    if recorder is None or recorder.making is None:
        return
    (make, after, start), recorder.making = recorder.making, None  # once for each pass
    assert recorder.inputs[0] is not None
    device = recorder.inputs[0].device
    made = (step.result for step in recorder.done[start:] if step.result is not None)
    number = workers(device)
    if number == 1:
        return
    getattr(triton.runtime.cache, "triton_key", int)()  # else each thread reads all of triton's files for it at first
    with (
        suppress(Exception),
        _turns.held(),
        ThreadPoolExecutor(number) as threads,
        replay.noted_by(Survey(device, threads, made)),
    ):
        results = make()  # first, so that the kernels of this pass are the first
        if after is not None:
            after(*results)


def workers(device: torch.device) -> int:
    """How many kernels are compiled at a time: as many as there are cores, where Triton's compiler runs in threads.

    One while a graph is captured: what a survey asks torch for would become a part of it.
    """
    if device.type != "cuda" or not hasattr(triton, "AsyncCompileMode") or torch.cuda.is_current_stream_capturing():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _compile(
    device: torch.device, kernel: Any, arguments: dict[str, Any], keep: Callable[[CompiledKernel], Any]
) -> None:
    """Compile and load a kernel, and what launches it, which triton compiles too."""
    with replay.on(device):
        made = kernel.warmup(grid=(1, 1), **arguments)
        if isinstance(made, CompiledKernel):
            _ = made.run
            keep(made)
