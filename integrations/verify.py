"""`FLASHBIAS_VERIFY=1`: in eager mode, every covered call runs twice, and the difference is reported per layer.

The replacement's result is what the model gets. The table goes to stderr when the process ends;
`differences()` returns it at any time. Forward only.
"""

import atexit
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


@dataclass
class Difference:
    """Largest difference between replacement and original over all calls of one layer.

    `layer` is the module's class and its number in the order of first calls. `largest` is the largest entry of the
    original's output, to compare `difference` with. A NaN in only one of the two counts as an infinite difference.
    """

    layer: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    calls: int = 0
    difference: float = 0.0
    largest: float = 0.0


_of_module: "WeakKeyDictionary[torch.nn.Module, Difference]" = WeakKeyDictionary()
_differences: list[Difference] = []


def enabled() -> bool:
    """Whether `FLASHBIAS_VERIFY` is set (to anything but `0` and the empty string)."""
    return os.environ.get("FLASHBIAS_VERIFY", "0") not in ("", "0")


def differences() -> list[Difference]:
    """What has been compared so far, in the order of first calls."""
    return list(_differences)


def forget() -> None:
    """Start anew."""
    _of_module.clear()
    _differences.clear()


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
        expected = original(*args, **kwargs)
    result = replacement(module, *args, **kwargs)
    leaves = [
        (ours.detach(), theirs)
        for ours, theirs in zip(tree_leaves(result), tree_leaves(expected), strict=True)
        if isinstance(theirs, Tensor) and theirs.is_floating_point()
    ]
    for ours, theirs in leaves:
        _record(module, ours, theirs)
    return result


def _record(module: torch.nn.Module, ours: Tensor, theirs: Tensor) -> None:
    entry = _of_module.get(module)
    if entry is None:
        if not _differences:
            atexit.register(report)
        name = f"{type(module).__name__} {len(_differences)}"
        entry = _of_module[module] = Difference(name, tuple(theirs.shape), theirs.dtype)
        _differences.append(entry)
    entry.calls += 1
    if theirs.numel() == 0:
        return
    gap = (ours.double() - theirs.double()).abs()
    gap[(ours == theirs) | (ours.isnan() & theirs.isnan())] = 0  # equal infinities have a NaN between them
    entry.difference = max(entry.difference, gap.nan_to_num(nan=float("inf")).max().item())
    entry.largest = max(entry.largest, theirs.double().nan_to_num().abs().max().item())


def report() -> None:
    """Print the table to stderr."""
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(
        Column("layer", no_wrap=True),
        "shape",
        "dtype",
        "calls",
        "largest difference",
        "largest entry",
        title="FLASHBIAS_VERIFY",
    )
    for entry in _differences:
        table.add_row(
            entry.layer,
            " x ".join(map(str, entry.shape)),
            str(entry.dtype).removeprefix("torch."),
            str(entry.calls),
            f"{entry.difference:.2e}",
            f"{entry.largest:.2e}",
        )
    if _differences:
        Console(stderr=True).print(table)
