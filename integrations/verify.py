"""`FLASHBIAS_VERIFY=1`: in eager mode, every covered call runs twice, and the difference is reported per layer.

`FLASHBIAS_VERIFY=first`: only the first call of each layer, so that a long run takes hardly longer.

The replacement's result is what the model gets. The table goes to stderr when the process ends;
`differences()` returns it at any time. Forward only.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .layers import Rows, print_table


@dataclass
class Difference:
    """Largest difference between replacement and original over all compared calls of one layer.

    `layer` is the module's name within the model that was called; called by itself, its class and its number in the
    order of first calls. `largest` is the largest entry of the original's output, to compare `difference` with. A NaN
    in only one of the two counts as an infinite difference.
    """

    layer: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    calls: int = 0
    difference: float = 0.0
    largest: float = 0.0


def enabled() -> bool:
    """Whether `FLASHBIAS_VERIFY` is set (to anything but `0` and the empty string)."""
    return os.environ.get("FLASHBIAS_VERIFY", "0") not in ("", "0")


def wanted(module: torch.nn.Module) -> bool:
    """Whether this call of a layer is to be compared."""
    return enabled() and (os.environ["FLASHBIAS_VERIFY"] != "first" or module not in _differences)


def differences() -> list[Difference]:
    """What has been compared so far, in the order of first calls."""
    return list(_differences.rows)


def comparing() -> bool:
    """Whether the host's own code is running to be compared with."""
    return _comparing.get()


def compare(
    module: torch.nn.Module,
    original: Callable[..., Any],
    replacement: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Run `original(*args)`, then `replacement(module, *args)`, and return what the second returns.

    Both draw the same random numbers, and the generators end as if only one had run.
    """
    devices = {leaf.device for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.is_cuda}
    with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
        token = _comparing.set(True)
        try:
            expected = original(*args, **kwargs)
        finally:
            _comparing.reset(token)
    result = replacement(module, *args, **kwargs)
    for ours, theirs in zip(tree_leaves(result), tree_leaves(expected), strict=True):
        # What a replacement does not return, such as attention weights, is not compared.
        if isinstance(ours, Tensor) and isinstance(theirs, Tensor) and theirs.is_floating_point():
            _record(module, ours.detach(), theirs)
    return result


def _record(module: torch.nn.Module, ours: Tensor, theirs: Tensor) -> None:
    entry = _differences.of(module, lambda name: Difference(name, tuple(theirs.shape), theirs.dtype))
    entry.calls += 1
    if theirs.numel() == 0:
        return
    gap = (ours.double() - theirs.double()).abs()
    gap[(ours == theirs) | (ours.isnan() & theirs.isnan())] = 0  # equal infinities have a NaN between them
    entry.difference = max(entry.difference, gap.nan_to_num(nan=float("inf")).max().item())
    entry.largest = max(entry.largest, theirs.double().nan_to_num().abs().max().item())


def report() -> None:
    """Print the table to stderr."""
    print_table(
        "FLASHBIAS_VERIFY",
        ("layer", "shape", "dtype", "calls", "largest difference", "largest entry"),
        [
            (
                entry.layer,
                " x ".join(map(str, entry.shape)),
                str(entry.dtype).removeprefix("torch."),
                str(entry.calls),
                f"{entry.difference:.2e}",
                f"{entry.largest:.2e}",
            )
            for entry in _differences.rows
        ],
    )


_comparing: ContextVar[bool] = ContextVar("comparing", default=False)
_differences: Rows[Difference] = Rows(report)
forget = _differences.forget
