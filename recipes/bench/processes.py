"""Work in a process of its own, which may die: what it did until then is kept, and one learns where it died."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

PRELOAD = ("torch", "flashbias.recipes.bench.measure")  # imported once for all processes, where the system can fork

Work = Callable[[Any, Callable[[str], None]], Any]


def stream(
    work: Work, tasks: Sequence[Any], environment: Mapping[str, str], silence: float
) -> Iterator[tuple[str, Any]]:
    """Do tasks one after the other in a new process, and report on them.

    `work(task, say)` returns the result of a task. `environment` is added to that of the process, before it starts.
    Yields ("doing", text) for each `say(text)`, and ("done", result) for each task; ("died", reason) if there comes
    nothing more before all are done: because work raised an exception, the process ended, or it was still for
    `silence` seconds and was ended. All arguments have to be picklable.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(list(PRELOAD))
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, work, tasks, dict(environment)))  # type: ignore[attr-defined]
    process.start()
    sender.close()
    missing = len(tasks)
    try:
        while missing:
            if not receiver.poll(silence):
                yield "died", f"no answer in {silence:.0f} s"
                return
            try:
                kind, value = receiver.recv()
            except EOFError:
                process.join()
                yield "died", _obituary(process.exitcode)
                return
            missing -= kind == "done"
            yield kind, value
            if kind == "died":
                return
        process.join(silence)
    finally:
        receiver.close()
        if process.is_alive():
            process.kill()
        process.join()


def _serve(sender: Connection, work: Work, tasks: Sequence[Any], environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    os.dup2(2, 1)  # what others print is not a result
    for task in tasks:
        try:
            result = work(task, lambda text: sender.send(("doing", text)))
        except Exception as error:
            sender.send(("died", f"{type(error).__name__}: {error}"))
            os._exit(1)  # after an error of a kernel, tearing down may hang
        sender.send(("done", result))


def _obituary(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"the process died of {signal.Signals(-exitcode).name}"
    return f"the process ended with exit code {exitcode}"
