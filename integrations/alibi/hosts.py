"""What the three hosts share: how a model asks for a mask, and how a call is handed back to it.

Of transformers 4.57 to 5.x. At first the models made their masks themselves (BLOOM and Falcon by `_update_causal_mask`,
MPT by `_prepare_4d_causal_attention_mask`), later all by the library's `create_causal_mask`: `is_older` tells which.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashbias.integrations.integration import Replacement, is_hooked, not_computable, say_once
from flashbias.patches.source import find_source

from .positions import Positions, place

NAME = "factored_bias"  # of the attention, for `attn_implementation=`
VERSIONS = ">=4.57,<6"
KEPT = "forward_before_flashbias"

# Which models are served: "all", or those that have asked for it by `NAME`. `configure` sets it.
SERVED = ["all"]


def is_older(module: str) -> bool:
    """Whether a model's module, which is not imported for that, makes its masks itself."""
    file = find_source(module)
    return file is not None and "create_causal_mask" not in file.read_text(encoding="utf-8")


def leaves(host: str, implementation: str, tokens: Any) -> bool:
    """Whether a model's call is left to the host, said once."""
    reason = None
    if implementation == NAME:
        pass
    elif SERVED[0] != "all":
        reason = f"a model without attn_implementation={NAME!r}"
    elif implementation not in ("eager", "sdpa"):
        reason = f"attn_implementation={implementation!r}"
    if tokens is not None and (not isinstance(tokens, Tensor) or tokens.dim() != 2):
        reason = "an attention mask of other than two dimensions"
    if reason is not None:
        say_once(f"alibi: {host}: {reason} is not covered, the host's own code computes it")
    return reason is not None


def with_cache(inputs: Tensor, tokens: Tensor | None, cache: Any) -> Positions:
    """The positions of inputs `(B, N, channels)` behind a cache, or None, as later versions keep it."""
    n_q = inputs.shape[1]
    if cache is None:
        return place(n_q, n_q if tokens is None else tokens.shape[-1], 0, tokens, inputs.device)
    n_k, _ = cache.get_mask_sizes(n_q, 0)
    return place(n_q, n_k, cache.get_seq_length(), tokens, inputs.device)


def with_older_cache(inputs: Tensor, tokens: Tensor | None, cache: Any, cache_position: Tensor) -> Positions:
    """The same for caches whose length the caller knows: `cache_position` `(N,)` are the places of the queries."""
    n_q = inputs.shape[1]
    if cache is not None and cache.is_compileable:
        return place(n_q, cache.get_max_cache_shape(), cache_position[0], tokens, inputs.device)
    past = 0 if cache is None else cache.get_seq_length()
    n_k = past + n_q if tokens is None else tokens.shape[-1]
    return place(n_q, n_k, n_k - n_q, tokens, inputs.device)


@dataclass(frozen=True)
class Attention(Replacement):
    """A layer's attention: what it gets for a mask is a `Positions`, and it appends to a cache.

    `mask_of(module, positions, options)` makes the mask that the host's own code wants.
    """

    mask_of: Callable[[Any, Positions, dict[str, Any]], Tensor] | None = None

    def __call__(self, module: Any, *args: Any, **options: Any) -> Any:
        if not isinstance(options["attention_mask"], Positions):  # the model's call was left to the host
            return getattr(module, self.original)(*args, **options)
        return super().__call__(module, *args, **options)

    def host_of(self, module: Any) -> Callable[..., Any]:
        original = getattr(module, self.original)

        def with_mask(*args: Any, **options: Any) -> Any:
            positions = options["attention_mask"]
            if isinstance(positions, Positions) and self.mask_of is not None:
                options["attention_mask"] = self.mask_of(module, positions, options)
            return original(*args, **options)

        return with_mask

    def rehearsal_of(self, module: Any) -> Callable[..., Any]:
        host = self.host_of(module)

        def on_copies(*args: Any, **options: Any) -> Any:
            return host(*args, **{name: _copy_of(value) for name, value in options.items()})

        return on_copies


def _copy_of(value: Any) -> Any:
    """Of a cache, one that can be appended to without a trace in it; anything else as it is."""
    if not hasattr(value, "layers") or not hasattr(value, "get_seq_length"):
        return value
    twin = copy.copy(value)
    twin.layers = [copy.copy(layer) for layer in value.layers]
    for layer in twin.layers:
        for name, entry in vars(layer).items():
            if isinstance(entry, Tensor):  # static ones are written to in place
                setattr(layer, name, entry.clone())
    return twin


def append(module: Any, cache: Any, key: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Keys and values of this call behind those in the cache, where there is one."""
    if cache is None:
        return key, value
    if "cache_position" in options:  # the older caches want to be told
        return cache.update(key, value, module.layer_idx, {"cache_position": options["cache_position"]})
    return cache.update(key, value, module.layer_idx)


def additive(positions: Positions, like: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """The mask as numbers to add: the bias where a query attends, elsewhere the lowest number of the dtype."""
    bias = torch.as_tensor(bias, dtype=like.dtype, device=like.device)
    return torch.where(positions.allowed(like.device), bias, torch.finfo(like.dtype).min)


def not_covered(module: Any, x: Tensor, dropout: float, options: dict[str, Any]) -> str | None:
    """Why the operator cannot take the place of this layer's attention, or None."""
    if reason := not_computable(x, module.head_dim):
        return reason
    if options.get("output_attentions"):
        return "output_attentions"
    if options.get("head_mask") is not None:
        return "a head mask"
    if module.training and dropout > 0:
        return "attention dropout in training"
    if isinstance(probe := getattr(module, "attention_dropout", None), torch.nn.Module) and is_hooked(probe):
        return "a hook on the attention weights, which are never made,"
    return None
