"""How a workload is put to ours and to what torch has.

An adapter takes the problem, its tensors by name and whether there is a way back, and returns a `Ready`; it raises
`Refused` where its peer cannot do the workload. It may put tensors of other strides in place of those it was given.
What depends on the bias alone is made beforehand when there is no way back, and is part of every call when there is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashbias import biased_attention

from .problem import Problem, Ready, Refused, need_memory

Tensors = dict[str, Tensor]
ALIGNMENT = 8  # head dims of fused kernels are multiples of it


def flashbias(problem: Problem, tensors: Tensors, gradients: bool) -> Ready:
    """The public operator; the bias is made anew in every call."""
    causal = problem.workload.causal

    def run() -> Any:
        query, key, value = inputs(tensors)
        return biased_attention(query, key, value, problem.bias(tensors), is_causal=causal)

    return Ready(run)


def sdpa(backend: str | None, problem: Problem, tensors: Tensors, gradients: bool) -> Ready:
    """SDPA without any bias, by the backend of that name or torch's choice."""
    causal = problem.workload.causal
    return Ready(lambda: _attend(backend, *inputs(tensors), is_causal=causal), bias_gradient=False)


def sdpa_dense(backend: str | None, problem: Problem, tensors: Tensors, gradients: bool) -> Ready:
    """SDPA with bias and mask as one matrix. cuDNN refuses one that has a gradient."""
    matrix, differentiable = matrix_of(problem, tensors, gradients and backend != "CUDNN_ATTENTION")
    return Ready(lambda: _attend(backend, *inputs(tensors), attn_mask=matrix), (matrix,), differentiable)


def sdpa_concat(backend: str | None, problem: Problem, tensors: Tensors, gradients: bool) -> Ready:
    """SDPA on queries and keys with factors of the bias as further features."""
    join, made = joined(problem, tensors, gradients)
    scale, causal, width = problem.scale, problem.workload.causal, problem.workload.head_dim

    def run(pad: bool) -> Tensor:
        query, key, value = join(pad)
        return _attend(backend, query, key, value, is_causal=causal, scale=scale)[..., :width]

    # All but cuDNN want values as wide as keys.
    pad = backend != "CUDNN_ATTENTION" or not _works(lambda: run(False), problem, tensors, gradients)
    return Ready(lambda: run(pad), made)


def flex(problem: Problem, tensors: Tensors, gradients: bool) -> Ready:
    """FlexAttention, compiled. Slopes and distances are computed for each score, other biases read from a matrix.

    Its gradients of what a score reads are sums by atomics in random order; it is spared them.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    w, offset = problem.workload, problem.offset
    made: tuple[Tensor, ...] = ()
    if "slopes" in tensors:
        slopes = tensors["slopes"].detach()

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + slopes[h] * (j - i - offset)
    elif "points" in tensors:
        x, y, z = tensors["points"].detach()[0].T.contiguous().unbind()
        weight = tensors["weight"].detach()[0]

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            square = (x[i] - x[j]) * (x[i] - x[j]) + (y[i] - y[j]) * (y[i] - y[j]) + (z[i] - z[j]) * (z[i] - z[j])
            return score - weight[h, i] * square
    else:
        matrix = problem.dense()
        made = (matrix,)
        if matrix.shape[0] == 1:
            plane = matrix[0]

            def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return score + plane[h, i, j]
        else:

            def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return score + matrix[b, h, i, j]

    mask = None
    if w.causal:
        mask = create_block_mask(
            lambda b, h, i, j: j <= i + offset, None, None, w.n_q, w.n_k, device=str(problem.device)
        )
    attend = torch.compile(flex_attention, dynamic=False)
    return Ready(lambda: attend(*inputs(tensors), score_mod=score_mod, block_mask=mask), made, bias_gradient=False)


def compiled(problem: Problem, tensors: Tensors, gradients: bool) -> Ready:
    """Plain code under torch.compile, which holds all scores in memory."""
    w = problem.workload
    matrices = 6 if gradients else 3  # of the dtype of the query, live at once
    size = matrices * w.batch * w.heads * w.n_q * w.n_k * problem.cotangent.itemsize
    need_memory(size, "holding all scores", problem.device)

    def attend(tensors: Tensors) -> Tensor:
        query, key, value = inputs(tensors)
        scores = (query @ key.mT).float() * problem.scale + problem.bias(tensors).dense(w.n_q, w.n_k)
        if w.causal:
            allowed = torch.ones(w.n_q, w.n_k, dtype=torch.bool, device=query.device).tril(problem.offset)
            scores = scores.masked_fill(~allowed, -torch.inf)
        return scores.softmax(-1).to(value.dtype) @ value

    attend = torch.compile(attend, dynamic=False)
    return Ready(lambda: attend(tensors))


def inputs(tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    return tensors["query"], tensors["key"], tensors["value"]


def matrix_of(problem: Problem, tensors: Tensors, gradients: bool) -> tuple[Tensor, bool]:
    """Bias and mask as a matrix, and whether the tensors of the bias get gradients through it."""
    matrix = problem.dense()
    if not gradients or "values" not in tensors:
        return matrix, False
    tensors["values"] = matrix.detach().requires_grad_()  # the same values in rows that start at multiples of 16
    return tensors["values"], True


def joined(
    problem: Problem, tensors: Tensors, gradients: bool
) -> tuple[Callable[[bool], tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """What joins features and factors, and tensors that were made beforehand.

    The function returns query, key and value, the latter padded to their width if asked. Queries and keys are new in
    every call of a model, so joining them is part of the call.
    """
    w = problem.workload

    def factors() -> tuple[Tensor, Tensor]:
        pair = problem.factors(tensors, unit=problem.scale)
        missing = -(w.head_dim + pair[0].shape[-1]) % ALIGNMENT
        return F.pad(pair[0], (0, missing)), F.pad(pair[1], (0, missing))

    made = factors()
    if w.head_dim + made[0].shape[-1] > 256:
        raise Refused(f"{w.head_dim} features and {made[0].shape[-1]} columns of factors are more than 256")

    def join(pad: bool) -> tuple[Tensor, ...]:
        query, key, value = inputs(tensors)
        q_factor, k_factor = factors() if gradients else made
        query = torch.cat((query, q_factor.expand(*query.shape[:-1], -1)), -1)
        key = torch.cat((key, k_factor.expand(*key.shape[:-1], -1)), -1)
        return query, key, F.pad(value, (0, query.shape[-1] - value.shape[-1])) if pad else value

    return join, () if gradients else made


def _attend(backend: str | None, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with nullcontext() if backend is None else sdpa_kernel(getattr(SDPBackend, backend)):
        return F.scaled_dot_product_attention(query, key, value, **options)


def _works(run: Callable[[], Tensor], problem: Problem, tensors: Tensors, gradients: bool) -> bool:
    """Whether a call is accepted, and its way back."""
    try:
        out = run()
        if gradients:
            torch.autograd.grad(out, inputs(tensors), problem.cotangent)
    except RuntimeError:
        return False
    return True
