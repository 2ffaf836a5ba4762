"""Exact or factored: in which form a bias that is made from weights is kept for inference, and why."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashbias import Bias, DenseBias, decompose, plan
from flashbias.errors import FlashBiasError

MODES = ("exact", "auto", "factored")
RANKS = range(16, 129, 16)  # that `auto` tries: the kernels take columns by 16
BATCH_ROWS = 64  # for the cost model: windows and images that share the bias, at least


class ConfigurationError(FlashBiasError, ValueError):
    """An integration has no such mode, rank or tolerance."""


@dataclass(frozen=True)
class Settings:
    """How the bias is kept for inference.

    mode: "exact", the matrix. "auto", for each layer factors of the smallest rank that meets the tolerance, where the
        cost model of `flashbias.plan` says that they pay, otherwise the matrix. "factored", factors of this `rank`.
    rank: of "factored".
    tolerance: of "auto": relative error of attention's output, beyond that of the matrix in the same dtype, measured
        with random unit queries and keys at the layer's own scale and random values (`flashbias.decompose.svd`).
    """

    mode: str = "auto"
    rank: int = 16
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        for wrong, found, wanted in (
            (self.mode not in MODES, f"mode={self.mode!r}", " or ".join(map(repr, MODES))),
            (type(self.rank) is not int or self.rank < 1, f"rank={self.rank!r}", "a whole number, 1 or more"),
            (not self.tolerance >= 0, f"tolerance={self.tolerance}", "0 or more"),
        ):
            if wrong:
                raise ConfigurationError(found, wanted, "choose one of these")


@dataclass(frozen=True)
class Choice:
    """What a layer's bias was kept as.

    layer: the module's name within its model. bias: "exact", "factored", or "undecided" before the first call in
    inference. rank: of the factors that were tried, output_error: of attention with them, table_error: of attention
    with the matrix in the same dtype, both relative and in the worst head; None where none were tried.
    """

    layer: str
    bias: str
    reason: str
    rank: int | None = None
    output_error: float | None = None
    table_error: float | None = None


def choose(
    make: Callable[[torch.dtype], Tensor], dtype: torch.dtype, scale: Tensor, head_dim: int, settings: Settings
) -> tuple[Bias, Choice]:
    """The bias as it is kept in `dtype`, and the choice, of a layer without a name yet.

    `make(dtype)` is its matrix `(H, N, N)`; `scale`, `(H,)`, multiplies products of unit queries and keys.
    """
    if settings.mode == "exact":
        return DenseBias(make(dtype)), Choice("", "exact", "asked for")
    table = make(torch.float32)
    n, device, name = table.shape[-1], table.device.type, str(dtype).removeprefix("torch.")
    pay = [r for r in RANKS if plan.factors_pay(n, n, head_dim, r, BATCH_ROWS, device, dtype.itemsize)]
    if settings.mode == "auto" and not pay:
        return DenseBias(make(dtype)), Choice("", "exact", f"factors of {n} keys in {name} do not pay on {device}")
    if not bool(table.isfinite().all()):
        return DenseBias(make(dtype)), Choice("", "exact", "it has infinite or NaN entries")
    probe: dict[str, Any] = {"dtype": dtype, "scale": scale, "head_dim": head_dim, "randomised": True}
    if settings.mode == "factored":
        found = decompose.svd(table, settings.rank, **probe)
        return found.bias(), _choice("factored", "asked for", found)
    found = decompose.svd(table, max(pay), tolerance=settings.tolerance, step=RANKS.step, **probe)
    if found.excess <= settings.tolerance:
        return found.bias(), _choice("factored", f"pays, and is within {settings.tolerance:.0e}", found)
    reason = f"factors of rank {found.rank}, the highest that pays, are not within {settings.tolerance:.0e}"
    return DenseBias(make(dtype)), _choice("exact", reason, found)


def _choice(bias: str, reason: str, found: decompose.Decomposition) -> Choice:
    errors = (error.max().item() for error in (found.output_error, found.table_error))
    return Choice("", bias, reason, found.rank, *errors)
