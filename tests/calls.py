"""Calls of the operator that differ in one thing each, for tests of what is kept from one call for the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashbias import ALiBi, Causal, DenseBias, FactoredBias, KeyPadding, RelativePositionBias, SpatialDistance

N, HEADS, C = 20, 2, 16


def tensors(device: str) -> dict[str, Tensor]:
    made = {name: torch.randn(2, HEADS, N, C, device=device) for name in ("query", "key", "value")}
    made |= {"values": torch.randn(HEADS, N, N, device=device), "slopes": torch.rand(HEADS, device=device)}
    return made | {"table": torch.randn(HEADS, 9, device=device)}


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _askew(x: Tensor) -> Tensor:
    """At an address that is no multiple of 16 bytes."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


def _distances(t: dict[str, Tensor], x_q: Tensor, x_k: Tensor) -> dict[str, Any]:
    return {"bias": SpatialDistance(x_q, x_k, t["slopes"][:, None])}


# Calls of the same shapes that differ in one thing each.
CALLS: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "plain": lambda t: {},
    "strides": lambda t: {"query": _transposed(t["query"]), "value": _transposed(t["value"])},
    "address": lambda t: {"query": _askew(t["query"]), "key": _askew(t["key"])},
    "broadcast": lambda t: {"key": t["key"][:1].expand(2, -1, -1, -1)},
    "dtype": lambda t: {name: t[name].half() for name in ("query", "key", "value")},
    "scale": lambda t: {"scale": 0.5},
    "causal": lambda t: {"is_causal": True},
    "offset": lambda t: {"mask": Causal(3)},
    "offsets": lambda t: {"mask": Causal(torch.tensor([3, 5], device=t["query"].device))},
    "lengths": lambda t: {"mask": KeyPadding(torch.tensor([3, N], device=t["query"].device))},
    "longer": lambda t: {"mask": KeyPadding(torch.tensor([N, 7], device=t["query"].device))},
    "allowed": lambda t: {"mask": t["values"] > 0},
    "slopes": lambda t: {"bias": ALiBi(t["slopes"])},
    "table": lambda t: {"bias": RelativePositionBias(t["table"])},
    "symmetric": lambda t: {"bias": ALiBi(t["slopes"], symmetric=True)},
    "dense": lambda t: {"bias": DenseBias(t["values"])},
    "row": lambda t: {"bias": DenseBias(t["values"][:, :1])},
    "one head": lambda t: {"bias": DenseBias(t["values"][:1])},
    "half": lambda t: {"bias": DenseBias(t["values"].half())},
    "repeated row": lambda t: {"bias": DenseBias(t["values"][:1, :1].expand(HEADS, N, N))},
    "columns first": lambda t: {"bias": DenseBias(t["values"].mT)},
    "rows apart": lambda t: {"bias": DenseBias(t["values"].repeat_interleave(2, -2)[:, ::2])},
    "heads swapped": lambda t: {"bias": DenseBias(torch.stack([t["values"]] * 2, 1).transpose(0, 1))},
    "factors": lambda t: {"bias": FactoredBias(t["query"][0], t["key"][0])},
    "distances": lambda t: _distances(t, t["query"][:, 0, :, :3], t["key"][:, 0, :, :3]),
    "distances of points to themselves": lambda t: _distances(t, *[t["query"][:, 0, :, :3]] * 2),
    "distances in double": lambda t: _distances(t, *[t["query"][:, 0, :, :3].double()] * 2),
    "narrow factors": lambda t: {"bias": FactoredBias(t["query"][0, ..., :5], t["key"][0, ..., :5])},
}


def run(changed: dict[str, Any], t: dict[str, Tensor], attention: Callable[..., Any]) -> tuple[Tensor, ...]:
    """Output and gradients of query, key and value."""
    arguments = {name: t[name] for name in ("query", "key", "value")} | changed
    leaves = [arguments.pop(name).detach().requires_grad_() for name in ("query", "key", "value")]
    bias = arguments.pop("bias", None)
    out = attention(*leaves, bias, **arguments)
    out = out[0] if isinstance(out, tuple) else out
    return out, *torch.autograd.grad(out.double().square().sum(), leaves)
