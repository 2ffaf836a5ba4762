"""`FLASHBIAS_PROFILE=1`: in eager mode, the time of each patched layer's forward calls.

On a GPU by events, so that nothing waits, elsewhere by the clock. The table goes to stderr when the process ends;
`timings()` returns it at any time. Calls that the host's own code computes, and those inside compiled graphs and
captured CUDA graphs, are not counted.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .layers import Rows, print_table

PENDING = 256  # pairs of events that a layer may have before they are read


@dataclass
class Timing:
    """The calls of one layer; `layer` is named as in `verify`. Seconds, `first` that of the first call."""

    layer: str
    calls: int = 0
    first: float = 0.0
    seconds: float = 0.0
    _pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list, repr=False)

    def add(self, seconds: float) -> None:
        self.calls += 1
        self.first = self.first or seconds
        self.seconds += seconds

    def add_events(self, start: torch.cuda.Event, end: torch.cuda.Event) -> None:
        self._pending.append((start, end))
        if len(self._pending) >= PENDING:
            self.settle()

    def settle(self) -> None:
        """Read the events, waiting for the last."""
        for start, end in self._pending:
            end.synchronize()
            self.add(start.elapsed_time(end) / 1e3)
        self._pending.clear()


def enabled() -> bool:
    """Whether `FLASHBIAS_PROFILE` is set (to anything but `0` and the empty string)."""
    return os.environ.get("FLASHBIAS_PROFILE", "0") not in ("", "0")


def timings() -> list[Timing]:
    """What has been timed so far, in the order of first calls."""
    for timing in _timings.rows:
        timing.settle()
    return list(_timings.rows)


def timed(
    module: torch.nn.Module, replacement: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """`replacement(module, *args)`, its time recorded."""
    device = next((leaf.device for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.is_cuda), None)
    if device is not None and torch.cuda.is_current_stream_capturing():
        return replacement(module, *args, **kwargs)
    timing = _timings.of(module, Timing)
    if device is None:
        started = time.perf_counter()
        result = replacement(module, *args, **kwargs)
        timing.add(time.perf_counter() - started)
        return result
    stream = torch.cuda.current_stream(device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(stream)
    result = replacement(module, *args, **kwargs)
    end.record(stream)
    timing.add_events(start, end)
    return result


def report() -> None:
    """Print the table to stderr."""
    rows = timings()
    total = sum(timing.seconds for timing in rows)
    print_table(
        "FLASHBIAS_PROFILE",
        ("layer", "calls", "first call, ms", "mean of the others, ms", "total, ms", "share"),
        [
            (
                timing.layer,
                str(timing.calls),
                f"{timing.first * 1e3:.3f}",
                f"{(timing.seconds - timing.first) / (timing.calls - 1) * 1e3:.3f}" if timing.calls > 1 else "",
                f"{timing.seconds * 1e3:.3f}",
                f"{timing.seconds / total:.1%}" if total else "",
            )
            for timing in rows
        ],
    )


_timings: Rows[Timing] = Rows(report)
forget = _timings.forget
