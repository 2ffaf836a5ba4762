"""The contract's check of a result on samples: its error against float64, measured by that of an eager computation.

Queries do not see each other, so exact gradients are sums over blocks of queries with all their keys: however long the
inputs, a block fits into memory. Of outputs some rows are compared; of gradients whole heads, with all the batch rows
and heads that share a tensor of the bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashbias import reference
from flashbias.testing import assert_as_accurate, eager

from .problem import AXES, Problem, place

INPUTS = ("query", "key", "value")
BATCHES, HEADS, ROWS = 4, 4, 64  # of outputs, at most
GRADIENT_BATCHES, GRADIENT_HEADS = 2, 2  # of gradients, unless more of them share a tensor
GRADIENT_SCORES = 2**31  # fewer heads than that where they have more scores together
BYTES_A_SCORE = 120  # of float64 with its gradients
CPU_BLOCK = 2**22  # scores of a block on a CPU; on a GPU a quarter of its free memory decides


@dataclass
class Sample:
    """Truth and measure for some rows of some heads: "out", and by name the gradients, if they are asked for."""

    batches: slice
    heads: slice
    rows: Tensor
    truth: dict[str, Tensor]
    measure: dict[str, Tensor]

    def errors(self, results: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
        """The largest error of each result in this sample, and that of the eager computation."""
        return {
            name: (_distance(self._of(name, result), self.truth[name]), _distance(self.measure[name], self.truth[name]))
            for name, result in results.items()
        }

    def check(self, results: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Raises `AssertionError` for the first result that is less accurate than the contract says."""
        for name, result in results.items():
            assert_as_accurate(name, self._of(name, result), self.measure[name], self.truth[name], dtype)

    def _of(self, name: str, result: Tensor) -> Tensor:
        part = result.detach()[place(name, result, self.batches, self.heads)]
        return part[..., self.rows, :] if name == "out" else part


def sample(problem: Problem, biased: bool, gradients: bool) -> Sample:
    """What the results of a problem are compared with, with its bias or without."""
    names = [name for name in problem.tensors if biased or name in INPUTS]
    w = problem.workload
    if gradients:
        batches, heads = _whole(problem, names)
        rows = torch.arange(w.n_q, device=problem.device)
    else:
        batches, heads = _some(w.batch, BATCHES), _some(w.heads, HEADS)
        rows = torch.linspace(0, w.n_q - 1, min(w.n_q, ROWS), device=problem.device).long()
    part = problem.part(batches, heads)
    truth = _evaluate(part, names, rows, gradients, reference, torch.float64)
    measure = _evaluate(part, names, rows, gradients, eager, torch.float32)
    for name, result in measure.items():  # as an eager computation returns it
        measure[name] = result.to(problem.tensors.get(name, problem.cotangent).dtype)
    return Sample(batches, heads, rows, truth, measure)


def _whole(problem: Problem, names: list[str]) -> tuple[slice, slice]:
    """Batch rows and heads whose gradients are complete sums."""
    w = problem.workload
    shared = [False, False]
    for name in names:
        for side, axis in enumerate(AXES.get(name, (0, 1))):
            shared[side] |= axis is None or problem.tensors[name].shape[axis] == 1
    batches = slice(None) if shared[0] else _some(w.batch, GRADIENT_BATCHES)
    room = GRADIENT_SCORES // (w.scores // w.batch // w.heads * len(range(w.batch)[batches]))
    heads = slice(None) if shared[1] else _some(w.heads, max(1, min(room, GRADIENT_HEADS)))
    return batches, heads


def _some(size: int, count: int) -> slice:
    """At most `count` of so many, evenly spread."""
    return slice(0, size, -(-size // count))


def _evaluate(
    part: Problem, names: list[str], rows: Tensor, gradients: bool, attend: Callable[..., Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Output of the rows and gradients by name, block by block, summed in `dtype`.

    In float64 everything is computed in it. In fp32 query, key and value keep their dtype; the tensors of the bias do
    not, so that sums over blocks are rounded once, as without blocks.
    """
    n_b, n_h, _, c = part.cotangent.shape
    inputs = {name: part.tensors[name] for name in names}
    totals = {"out": part.cotangent.new_zeros((n_b, n_h, len(rows), c), dtype=dtype)}
    if gradients:
        totals |= {name: torch.zeros_like(tensor, dtype=dtype) for name, tensor in inputs.items()}
    scores = _block_scores(part.device)
    step_b = max(1, scores // (len(rows) * part.workload.n_k))
    step_r = max(1, min(len(rows), scores // part.workload.n_k))
    for h in range(n_h):
        for b in range(0, n_b, step_b):
            here = slice(b, b + step_b), slice(h, h + 1)
            block = part.part(*here)
            leaves = {
                name: block.tensors[name]
                .to(block.cotangent.dtype if name in INPUTS and dtype != torch.float64 else dtype)
                .detach()
                .requires_grad_(gradients)
                for name in names
            }
            for start in range(0, len(rows), step_r):
                some = rows[start : start + step_r]
                bias = part.bias(leaves, some) if len(names) > len(INPUTS) else None
                query, key, value = leaves["query"][..., some, :], leaves["key"], leaves["value"]
                out, _ = attend(query, key, value, bias, mask=part.allowed(some))
                totals["out"][here][:, :, start : start + step_r] = out.detach()
                if gradients:
                    cotangent = block.cotangent[..., some, :].to(out.dtype)
                    for name, gradient in zip(
                        names, torch.autograd.grad(out, list(leaves.values()), cotangent), strict=True
                    ):
                        totals[name][place(name, totals[name], *here)] += gradient
    return totals


def _block_scores(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_BLOCK
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0] // 4 // BYTES_A_SCORE


def _distance(found: Tensor, truth: Tensor) -> float:
    return (found.double() - truth).abs().max().item()
