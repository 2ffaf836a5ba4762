"""Thin factors for a bias that is given as a matrix, and what they cost in accuracy.

    found = flashbias.decompose.svd(bias, rank=16, dtype=torch.float16)
    out = flashbias.biased_attention(query, key, value, found.bias())

Softmax does not see what is constant along a row. So each row's mean is taken out before the decomposition: the columns
then go into what attention sees, and 'keep 99.5 % of the energy' does not mostly measure that constant.

A bias error of 0.1 may be harmless or not, depending on where attention looks. So factors are judged by the error that
reaches attention's output, beside that of the exact matrix rounded to the same dtype.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .biases import FactoredBias
from .checks import check_floating
from .errors import DtypeError, ShapeError, UnsupportedError

PROBE_ROWS = 256  # queries of a probe at most; it attends to all keys
OVERSAMPLING, POWER_ITERATIONS = 16, 2


@dataclass(frozen=True)
class Decomposition:
    """Factors of a bias `(*batch, H, Nq, Nk)` less its row means, and their errors, one for each `(*batch, H)`.

    q_factor, k_factor: `(*batch, H, N, R)`, singular values spread evenly to both sides.
    row_means: `(*batch, H, Nq)`, fp32 at least. Attention's output does not depend on them; add them to an LSE.
    spectrum: `(*batch, H, S)`, singular values in descending order, all of them or (`randomised`) the leading ones.
    energy: the share of the sum of squares, without the row means, that the factors keep.
    bias_error: the largest entry of what they leave out, rounding included.
    output_error: relative error of attention's output (root of the sum of squares) with the factors.
    table_error: the same with the exact bias rounded to the dtype of the factors.
    """

    q_factor: Tensor
    k_factor: Tensor
    row_means: Tensor
    spectrum: Tensor
    energy: Tensor
    bias_error: Tensor
    output_error: Tensor
    table_error: Tensor

    @property
    def rank(self) -> int:
        return self.q_factor.shape[-1]

    @property
    def excess(self) -> float:
        """By how much the factors' output error exceeds the rounded table's, in the worst head."""
        return (self.output_error - self.table_error).amax().item()

    def bias(self) -> FactoredBias:
        """The bias to compute with."""
        return FactoredBias(self.q_factor, self.k_factor)


@torch.no_grad()
def svd(
    bias: Tensor,
    rank: int | None = None,
    *,
    tolerance: float | None = None,
    step: int = 1,
    dtype: torch.dtype | None = None,
    scale: float | Tensor = 1.0,
    head_dim: int = 32,
    randomised: bool = False,
    seed: int = 0,
) -> Decomposition:
    """The best factors of a given rank, by a singular value decomposition in float64.

    Args:
        bias: `(*batch, H, Nq, Nk)`, any floating dtype, finite.
        rank: the number of columns; by default, or where it is larger, all of them: the lesser of Nq and Nk.
        tolerance: take the smallest rank, a multiple of `step` and at most `rank`, whose `excess` is no larger. Where
            none is small enough, the factors have `rank` columns; look at `excess`.
        dtype: of the factors, and of the table to compare with; by default that of the bias.
        scale, head_dim: of the attention that errors are measured in. Its queries and keys are random unit vectors, its
            values random normal; scores are `scale * q . k + bias`, scale a number or `(*batch, H)`, softmax float64.
        randomised: find only the leading singular values, by `torch.svd_lowrank`, which is many times as fast where
            rank is much smaller than N, and close to the best. Reported errors are measured all the same.
        seed: of the random numbers. The state of torch's own generators does not change.

    Raises:
        ShapeError, DtypeError: for a bias, a rank, a step or a dtype that cannot be used.
        UnsupportedError: for infinite or NaN entries.
    """
    check_floating("bias", bias)
    if bias.dim() < 2 or bias.numel() == 0:
        raise ShapeError(f"bias of shape {tuple(bias.shape)}", "(*batch, H, Nq, Nk), not empty", "pass a matrix")
    most = min(bias.shape[-2:])
    if rank is not None and (int(rank) != rank or rank < 1):
        raise ShapeError(f"rank={rank}", f"1 to {most}", "leave it out to keep all columns")
    if step < 1:
        raise ShapeError(f"step={step}", "1 or more", "leave it out to try every rank")
    if dtype is not None and not dtype.is_floating_point:
        raise DtypeError(f"dtype={dtype}", "a floating dtype", "leave it out to keep that of the bias")
    if not bool(bias.isfinite().all()):
        raise UnsupportedError(
            "a bias with infinite or NaN entries", "finite entries", "say what may not be attended to by a mask"
        )
    limit = most if rank is None else min(rank, most)
    dtype = dtype or bias.dtype
    exact = bias.double()  # which no setting for the products of fp32 matrices touches
    means = exact.mean(-1, keepdim=True)
    centred = exact - means
    left, spectrum, right = _decompose(centred, limit if randomised else most, randomised, seed)
    root = spectrum[..., None, :limit].sqrt()
    q_factor, k_factor = ((side[..., :limit] * root).to(dtype) for side in (left, right))

    probe = _Probe(exact, scale, head_dim, seed)
    table_error = probe.error(exact[..., probe.rows, :].to(dtype).double())

    def output_error(columns: int) -> Tensor:
        rows = q_factor[..., probe.rows, :columns].double()
        return probe.error(rows @ k_factor[..., :columns].double().mT)

    chosen = limit
    if tolerance is not None:
        ranks = [*range(step, limit, step), limit]
        met = bisect_left(ranks, True, key=lambda r: bool((output_error(r) - table_error).amax() <= tolerance))
        chosen = ranks[min(met, len(ranks) - 1)]
    q_factor, k_factor = q_factor[..., :chosen].contiguous(), k_factor[..., :chosen].contiguous()
    total = centred.square().sum((-2, -1))
    kept = spectrum[..., :chosen].square().sum(-1)
    return Decomposition(
        q_factor=q_factor,
        k_factor=k_factor,
        row_means=means.squeeze(-1).to(torch.promote_types(bias.dtype, torch.float32)),
        spectrum=spectrum,
        energy=torch.where(total > 0, kept / total, 1.0).clamp(max=1.0),
        bias_error=(centred - q_factor.double() @ k_factor.double().mT).abs().amax((-2, -1)),
        output_error=output_error(chosen),
        table_error=table_error,
    )


def _decompose(matrix: Tensor, count: int, randomised: bool, seed: int) -> Sequence[Tensor]:
    """Left vectors, singular values and right vectors, at least `count` of each, the vectors as columns."""
    size = min(count + OVERSAMPLING, *matrix.shape[-2:])
    if not randomised or 2 * size > min(matrix.shape[-2:]):
        left, spectrum, right = torch.linalg.svd(matrix, full_matrices=False)
        return left, spectrum, right.mT
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(seed)
        return torch.svd_lowrank(matrix, q=size, niter=POWER_ITERATIONS)


class _Probe:
    """Attention with random queries, keys and values in float64, and its output with the exact bias."""

    def __init__(self, bias: Tensor, scale: float | Tensor, head_dim: int, seed: int) -> None:
        *batch, n_q, n_k = bias.shape
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.randperm(n_q, generator=generator)[:PROBE_ROWS].sort().values.to(bias.device)

        def normal(n: int) -> Tensor:
            draw = torch.randn(*batch, n, head_dim, generator=generator, dtype=torch.float64)
            return draw.to(bias.device)

        query, key = (torch.nn.functional.normalize(normal(n), dim=-1) for n in (len(self.rows), n_k))
        scale = torch.as_tensor(scale, dtype=torch.float64, device=bias.device)
        self.scores = query @ key.mT * scale[..., None, None]
        self.value = normal(n_k)
        self.out = self.attend(bias[..., self.rows, :])
        self.size = torch.linalg.matrix_norm(self.out)

    def attend(self, bias: Tensor) -> Tensor:
        return torch.softmax(self.scores + bias, -1) @ self.value

    def error(self, bias: Tensor) -> Tensor:
        """The relative error of the output with this bias (of the probe's rows), `(*batch, H)`."""
        return torch.linalg.matrix_norm(self.attend(bias) - self.out) / self.size
