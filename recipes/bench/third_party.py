"""How a workload is put to packages that may be installed, and to a checkout of the paper's code; see `adapters`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapters import Tensors, inputs, joined, matrix_of
from .problem import Problem, Ready, Refused


def xformers(problem: Problem, tensors: Tensors, gradients: bool) -> Ready:
    """Memory-efficient attention with a dense bias."""
    attend = importlib.import_module("xformers.ops").memory_efficient_attention
    matrix, differentiable = matrix_of(problem, tensors, gradients)
    batch = problem.workload.batch

    def run() -> Tensor:
        query, key, value = _sequence_first(*inputs(tensors))
        return attend(query, key, value, attn_bias=matrix.expand(batch, -1, -1, -1)).transpose(1, 2)

    return Ready(run, (matrix,), differentiable)


def flash_attn_2(problem: Problem, tensors: Tensors, gradients: bool) -> Ready:
    """flash-attn 2, with its own ALiBi where that is the bias (no gradient of slopes), else on joined factors."""
    attend = importlib.import_module("flash_attn").flash_attn_func
    if "slopes" not in tensors:
        return _on_joined(attend, problem, tensors, gradients)
    slopes, causal = tensors["slopes"].detach(), problem.workload.causal

    def run() -> Tensor:
        return attend(*_sequence_first(*inputs(tensors)), causal=causal, alibi_slopes=slopes).transpose(1, 2)

    return Ready(run, bias_gradient=False)


def flash_attn_3(problem: Problem, tensors: Tensors, gradients: bool) -> Ready:
    """flash-attn 3 on joined factors."""
    return _on_joined(importlib.import_module("flash_attn_interface").flash_attn_func, problem, tensors, gradients)


def flash_attn_4(problem: Problem, tensors: Tensors, gradients: bool) -> Ready:
    """flash-attn 4 on joined factors."""
    return _on_joined(importlib.import_module("flash_attn.cute").flash_attn_func, problem, tensors, gradients)


def cuequivariance(problem: Problem, tensors: Tensors, gradients: bool) -> Ready:
    """Triangle attention of cuEquivariance, bias `(1, 1, H, N, N)`."""
    _only_triangles(problem)
    attend = importlib.import_module("cuequivariance_torch").triangle_attention
    matrix, differentiable = matrix_of(problem, tensors, gradients)

    def run() -> Tensor:
        query, key, value = inputs(tensors)
        return attend(query[None], key[None], value[None], matrix[None], scale=problem.scale)[0]

    return Ready(run, (matrix,), differentiable)


def trifast(problem: Problem, tensors: Tensors, gradients: bool) -> Ready:
    """trifast's triangle attention, inputs `(1, H, N, N, C)`, bias `(1, H, N, N)`, a mask of what to leave out."""
    _only_triangles(problem)
    attend = importlib.import_module("trifast").triangle_attention
    matrix, differentiable = matrix_of(problem, tensors, gradients)
    n = problem.workload.n_q
    nothing = torch.zeros(1, n, n, dtype=torch.bool, device=problem.device)
    for name in ("query", "key", "value"):  # heads in front, as it wants them
        turned = tensors[name].detach().transpose(0, 1).contiguous().transpose(0, 1)
        tensors[name] = turned.requires_grad_(gradients)

    def run() -> Tensor:
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in inputs(tensors))
        return attend(query, key, value, matrix, nothing)[0].transpose(0, 1)

    return Ready(run, (matrix, nothing), differentiable)


def paper(repo: Path | None, problem: Problem, tensors: Tensors, gradients: bool) -> Ready:
    """The paper's kernel, from a checkout of its repository. Factors have all heads, and one batch row if shared."""
    attend = _load(repo).flash_bias_func
    heads, causal = problem.workload.heads, problem.workload.causal

    def factors() -> tuple[Tensor, ...]:
        pair = problem.factors(tensors)
        return _sequence_first(*(factor.expand(-1, heads, -1, -1).contiguous() for factor in pair))

    made = factors()

    def run() -> Tensor:
        pair = factors() if gradients else made
        return attend(*_sequence_first(*inputs(tensors)), *pair, None, causal, problem.scale).transpose(1, 2)

    return Ready(run, () if gradients else made)


def find(repo: Path) -> Path | None:
    """The file with the paper's kernels in a checkout."""
    paths = (repo / "flash_bias" / "flash_bias_triton.py", repo / "flash_bias_triton.py")
    return next((path for path in paths if path.is_file()), None)


def _load(repo: Path | None) -> Any:
    path = None if repo is None else find(repo)
    assert path is not None, "without a checkout the peer is absent"
    spec = importlib.util.spec_from_file_location("flash_bias_triton", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _on_joined(attend: Any, problem: Problem, tensors: Tensors, gradients: bool) -> Ready:
    join, made = joined(problem, tensors, gradients)
    causal, width = problem.workload.causal, problem.workload.head_dim

    def run() -> Tensor:
        out = attend(*_sequence_first(*join(True)), causal=causal, softmax_scale=problem.scale)
        out = out[0] if isinstance(out, tuple) else out
        return out.transpose(1, 2)[..., :width]

    return Ready(run, made)


def _only_triangles(problem: Problem) -> None:
    w = problem.workload
    if w.batch != w.n_q or not w.bias.startswith("shared"):
        raise Refused("it does triangle attention only")


def _sequence_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """`(B, H, N, C)` as `(B, N, H, C)`, without a copy."""
    return tuple(tensor.transpose(1, 2) for tensor in tensors)
