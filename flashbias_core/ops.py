"""The operator as torch sees it: schema, shapes, and the way back. The work is done by the backend that `plan` names.

`attention` takes the fields of `Operands` in their order. `attention_backward` returns a gradient for each of
`DIFFERENTIABLE`, an empty tensor where none is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import TransformType, peek_interpreter_stack
from torch.autograd import forward_ad

from . import plan
from .direct import AUTOCAST, has_gradient, is_unheard
from .errors import UnsupportedError
from .operands import Operands
from .output import new_output
from .signature import signature

# Makes of tensors what comes of a call.
Way = Callable[[Sequence[Tensor]], Sequence[Tensor]]
# The inputs of `attention` that have gradients, and their positions.
DIFFERENTIABLE = {"query": 0, "key": 1, "value": 2, "q_factor": 3, "k_factor": 4, "slopes": 5, "values": 8, "table": 9}

_OPERANDS = (
    "Tensor? q_factor, Tensor? k_factor, Tensor? slopes, Tensor? q_positions, Tensor? k_positions, Tensor? values, "
    "Tensor? table, Tensor? offsets, Tensor? lengths, Tensor? q_ids, Tensor? k_ids, Tensor? allowed, "
    "bool symmetric, bool causal, SymInt offset, float factor_unit, float scale"
)
_TENSORS = 3 + _OPERANDS.count("Tensor")  # as many inputs of `attention`, the first ones, are tensors or None


def _backend(query: Tensor) -> ModuleType:
    return _module(plan.backend(query.device))


@cache
def _module(backend: str) -> ModuleType:
    if backend == "triton":
        from .kernels import launch

        return launch
    from . import cpu

    return cpu


def like_before(make: Callable[[], Sequence[Tensor]], parts: tuple[Any, ...]) -> Sequence[Tensor]:
    """`make()`, what comes of a call of these parts, of which the first is query; shorter for one like another.

    A call is made in the same way as one before if all but what its tensors hold is the same. With gradients its
    operands, which are made of its bias, are a part of torch's graph.
    """
    tensors: list[Tensor] = []
    if torch.compiler.is_compiling() or not is_plain(parts[0].device.type):
        return make()
    known = signature(parts, tensors)
    if known is None or not is_unheard(tensors) or has_gradient(tensors):
        return make()
    return _backend(parts[0]).again(known, tensors, make)


def is_plain(kind: str) -> bool:
    """Whether calls on such a device are what they say: without autocast and forward-mode differentiation."""
    return kind in AUTOCAST and not torch.is_autocast_enabled(kind) and forward_ad._current_level < 0


def known_way(parts: tuple[Any, ...]) -> tuple[Way | None, list[Tensor]]:
    """How a plain call of these parts, without gradients, is made from its tensors, and which they are.

    None where `like_before` has made none like it, where each is made in a way of its own, or where two of the tensors
    begin at the same place.
    """
    tensors: list[Tensor] = []
    known = signature(parts, tensors)
    if known is None or not is_unheard(tensors) or plan.backend(parts[0].device) != "triton":
        return None, tensors
    return _backend(parts[0]).known_way(known, tensors), tensors


def attend(*inputs: Any) -> tuple[Tensor, Tensor]:
    """`attention`, but past torch's dispatcher where nobody listens there: it takes the host part of every call."""
    if not is_unheard(inputs[:_TENSORS]):
        return _TransformedAttention.apply(*inputs) if _is_transformed() else attention(*inputs)
    return _Attention.apply(*inputs) if has_gradient(inputs[:_TENSORS]) else _attention(*inputs)


# `torch.library.custom_op` would say the same, but checks its outputs in every call: up to 0.3 ms on the host.
_LIBRARY = torch.library.Library("flashbias", "DEF")
_LIBRARY.define(
    f"attention(Tensor query, Tensor key, Tensor value, {_OPERANDS}) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.define(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, bool[] wanted, "
    f"Tensor query, Tensor key, Tensor value, {_OPERANDS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
attention = torch.ops.flashbias.attention.default
attention_backward = torch.ops.flashbias.attention_backward.default


@torch.library.impl(_LIBRARY, "attention", "CompositeExplicitAutograd")
def _attention(
    query: Tensor, key: Tensor, value: Tensor, *operands: Any, wanted: Callable[[], set[str]] | None = None
) -> tuple[Tensor, Tensor]:
    """Output `(*batch, H, Nq, Cv)` in the dtype of query and LSE `(*batch, H, Nq)` fp32; `scale` is positive.

    `wanted()`, where gradients will be asked for, names those of `DIFFERENTIABLE` that have one.
    """
    *fields, scale = operands
    return _backend(query).forward(query, key, value, Operands(*fields), scale, wanted)


@torch.library.register_fake("flashbias::attention", lib=_LIBRARY)
def _(query: Tensor, key: Tensor, value: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
    return new_output(query, value.shape[-1]), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.impl(_LIBRARY, "attention_backward", "CompositeExplicitAutograd")
def _attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    wanted: list[bool],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *operands: Any,
) -> tuple[Tensor, ...]:
    """Gradients of `DIFFERENTIABLE` in their shapes and dtypes; `wanted` says which."""
    gradients = _gradients(grad_out, grad_lse, out, lse, wanted, query, key, value, *operands)
    return tuple(query.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _gradients(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, wanted: list[bool], *inputs: Any
) -> list[Tensor | None]:
    """Gradients of `DIFFERENTIABLE`, None where none is asked for."""
    query, key, value, *fields, scale = inputs
    names = _names(wanted)
    made = _backend(query).backward(grad_out, grad_lse, out, lse, query, key, value, Operands(*fields), scale, names)
    return [_like(inputs[position], made[name]) if name in names else None for name, position in DIFFERENTIABLE.items()]


def _names(wanted: list[bool]) -> set[str]:
    return {name for name, want in zip(DIFFERENTIABLE, wanted, strict=True) if want}


def _like(tensor: Tensor, gradient: Tensor) -> Tensor:
    """In the dtype of the tensor, and contiguous, as the compiler is told: those of factors are views of wider ones."""
    gradient = gradient if gradient.dtype == tensor.dtype else gradient.to(tensor.dtype)
    return gradient if gradient.is_contiguous() else gradient.contiguous()


@torch.library.register_fake("flashbias::attention_backward", lib=_LIBRARY)
def _(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, wanted: list[bool], *inputs: Any
) -> tuple[Tensor, ...]:
    return tuple(
        inputs[position].new_empty(inputs[position].shape) if want else grad_out.new_empty(0)
        for want, position in zip(wanted, DIFFERENTIABLE.values(), strict=True)
    )


def refuse_forward_mode() -> NoReturn:
    """Raise `UnsupportedError`."""
    raise UnsupportedError(
        "forward-mode differentiation of biased_attention",
        "gradients by backward",
        "use torch.autograd.grad, or flashbias.reference for forward mode",
    )


def _refuse_double_backward(ctx: Any, *gradients: Tensor | None) -> NoReturn:
    raise UnsupportedError(
        "a second derivative of biased_attention",
        "first derivatives",
        "use flashbias.reference for second derivatives, or detach the first gradient",
    )


def _refuse_vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
    raise UnsupportedError(
        "torch.vmap over biased_attention",
        "batch dimensions in front",
        "call it once with the mapped dimension as batch",
    )


class _Attention(torch.autograd.Function):
    """How gradients come back, as `torch.library.register_autograd` would have it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        if is_unheard(inputs[:_TENSORS]):
            out, lse = _attention(*inputs, wanted=lambda: _names(_wanted(ctx)))
        else:
            out, lse = _below_autograd(attention, inputs)
        _Attention.keep(ctx, inputs, (out, lse))
        return out, lse

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep what the way back needs."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *inputs[:_TENSORS])
        ctx.others = inputs[_TENSORS:]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, *tensors = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        if grad_lse is not None:
            # Where nothing was attended to, what made something of the LSE may well have no derivative.
            grad_lse = torch.where(lse == -torch.inf, 0.0, grad_lse)
        wanted = _wanted(ctx)
        # A graph of the gradients is refused by the operator.
        direct = not torch.is_grad_enabled() and is_unheard((grad_out, grad_lse, *tensors))
        run = _gradients if direct else _TransformedGradients.apply if _is_transformed() else attention_backward
        gradients = run(grad_out, grad_lse, out, lse, wanted, *tensors, *ctx.others)
        results: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for position, want, gradient in zip(DIFFERENTIABLE.values(), wanted, gradients, strict=True):
            results[position] = gradient if want else None
        return tuple(results)


class _Transformed(torch.autograd.Function):
    """What transforms of `torch.func` take, which do not go through torch's dispatcher."""

    vmap = staticmethod(_refuse_vmap)

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> NoReturn:
        refuse_forward_mode()


class _TransformedAttention(_Transformed):
    """`_Attention` for these transforms."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _below_autograd(attention, inputs)

    setup_context = _Attention.keep
    backward = _Attention.backward


class _TransformedGradients(_Transformed):
    """`attention_backward` for these transforms."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _below_autograd(attention_backward, inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    backward = staticmethod(_refuse_double_backward)


def _is_transformed() -> bool:
    """Whether a transform of `torch.func` is at work that wants functions of its own kind."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    return peek_interpreter_stack().key() != TransformType.Functionalize


def _wanted(ctx: Any) -> list[bool]:
    return [ctx.needs_input_grad[position] for position in DIFFERENTIABLE.values()]


def _below_autograd(operator: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*inputs)


# `torch.library.register_autograd` would do the same, but asks the schema for all its arguments once for each of them:
# as long on the host as everything else together.
@torch.library.impl(_LIBRARY, "attention", "Autograd")
def _attention_autograd(*inputs: Any) -> tuple[Tensor, Tensor]:
    return _Attention.apply(*inputs) if has_gradient(inputs[:_TENSORS]) else _below_autograd(attention, inputs)


torch.library.register_autograd("flashbias::attention_backward", _refuse_double_backward, lib=_LIBRARY)
torch.library.register_vmap("flashbias::attention", _refuse_vmap, lib=_LIBRARY)
torch.library.register_vmap("flashbias::attention_backward", _refuse_vmap, lib=_LIBRARY)
