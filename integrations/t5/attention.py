"""A layer's attention: its bias by distance from a table, its cache, and what is handed to the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashbias import RelativePositionBias, biased_attention
from flashbias.integrations import language_models
from flashbias.integrations.derived import Derived, keepable
from flashbias.integrations.integration import Replacement, is_hooked
from flashbias.integrations.language_models import Positions

from .masks import positions_of

_tables: Derived[Tensor] = Derived()

Buckets = Callable[[Any, Tensor], Tensor]  # of distances, by what a layer knows


def shared_buckets(module: Any, distance: Tensor) -> Tensor:
    """T5's, by a function that knows no layer."""
    return module._relative_position_bucket(
        distance,
        bidirectional=not module.is_decoder,
        num_buckets=module.relative_attention_num_buckets,
        max_distance=module.relative_attention_max_distance,
    )


def own_buckets(module: Any, distance: Tensor) -> Tensor:
    """UMT5's, by a method."""
    return module._relative_position_bucket(distance)


def make_table(module: Any, buckets: Buckets) -> Tensor:
    """The position bias of a layer by distance, `(H, 2 D - 1)` in fp32, which all layers of the stack then share."""
    reach = max(module.relative_attention_max_distance, module.relative_attention_num_buckets)
    distance = torch.arange(-reach, reach + 1, device=module.relative_attention_bias.weight.device)
    return module.relative_attention_bias(buckets(module, distance)).t().float()


def table_of(module: Any, buckets: Buckets) -> Tensor:
    """The same; without gradients kept until the weights change, since to find the buckets takes many small steps."""
    embedding = module.relative_attention_bias
    weight = embedding.weight
    plain = type(embedding) is torch.nn.Embedding and not is_hooked(embedding)
    if torch.is_grad_enabled() or not plain or not keepable([weight]):
        return make_table(module, buckets)
    key = module.is_decoder, module.relative_attention_num_buckets, module.relative_attention_max_distance
    return _tables.get(weight, [weight], key, lambda: make_table(module, buckets))


def _heads(module: Any, x: Tensor) -> Tensor:
    batch, n, _ = x.shape
    return x.view(batch, n, -1, module.key_value_proj_dim).transpose(1, 2)


def _keys_and_values(
    module: Any, hidden_states: Tensor, memory: Tensor | None, cache: Any, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Those of the layer, `(B, H, Nk, C)`, with the cache's, or in cross attention from there once they are known."""
    both = hasattr(cache, "is_updated")  # of an encoder and decoder
    if memory is None:
        own = cache.self_attention_cache if both else cache
    else:
        own = cache.cross_attention_cache if both else cache
        if both and cache.is_updated.get(module.layer_idx):
            return own.layers[module.layer_idx].keys, own.layers[module.layer_idx].values
        if "cache_position" in options:
            options = {**options, "cache_position": None}
    source = hidden_states if memory is None else memory
    key, value = (_heads(module, project(source)) for project in (module.k, module.v))
    key, value = language_models.append(module, own, key, value, options)
    if both and memory is not None:
        cache.is_updated[module.layer_idx] = True
    return key, value


def attend(
    buckets: Buckets,
    module: Any,
    hidden_states: Tensor,
    positions: Positions,
    memory: Tensor | None,
    table: Tensor | None,
    cache: Any,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Hidden states `(B, N, channels)` after attention, and the table `(H, 2 D - 1)` for the layers that follow."""
    query = _heads(module, module.q(hidden_states))
    key, value = _keys_and_values(module, hidden_states, memory, cache, options)
    if table is None and module.has_relative_attention_bias:
        table = table_of(module, buckets)
    bias = None if table is None else RelativePositionBias(table)
    mask = positions.once("mask", positions.mask)
    out = biased_attention(query, key, value, bias, mask=mask, scale=1.0)
    assert isinstance(out, Tensor)
    return module.o(language_models.join_heads(out)), table


def not_covered(
    module: Any,
    hidden_states: Tensor,
    positions: Positions,
    memory: Tensor | None,
    table: Tensor | None,
    cache: Any,
    **options: Any,
) -> str | None:
    if table is not None and table.dim() != 2:
        return "a position bias by another hand"
    if getattr(module, "pruned_heads", None):
        return "a layer with pruned heads"
    if options.get("layer_head_mask") is not None:
        return "a head mask"
    if options.get("cache") is not None:
        return "a paged cache"
    dim, dropout = module.key_value_proj_dim, module.dropout
    return language_models.not_covered(module, hidden_states, dim, dropout, options)


@dataclass(frozen=True)
class Attention(Replacement):
    """A layer of one of the hosts.

    call: gives the host's own code its arguments by its names. rows: the host makes masks of attention to both sides
    itself, `(B, 1, 1, Nk)`, or None where all keys count. adds_once: where it is given a position bias, that has the
    mask in it.
    """

    call: Callable[..., Any]
    rows: bool
    adds_once: bool

    def __call__(self, module: Any, hidden_states: Tensor, mask: Any, *args: Any, **options: Any) -> Any:
        memory = args[0]
        if not isinstance(mask, Positions) and self.rows and (memory is not None or not module.is_decoder):
            placed = positions_of(hidden_states, memory, mask)
            mask = mask if placed is None else placed
        if not isinstance(mask, Positions):  # the model's call was left to the host
            return self.call(getattr(module, self.original), hidden_states, mask, *args, **options)
        return super().__call__(module, hidden_states, mask, *args, **options)

    def is_watched(self, hidden_states: Tensor, positions: Positions, *args: Any, **options: Any) -> bool:
        return positions.once("watched", super().is_watched)

    def host_of(self, module: Any) -> Callable[..., Any]:
        original = getattr(module, self.original)

        def host(
            hidden_states: Tensor, positions: Positions, memory: Any, bias: Any, cache: Any, **options: Any
        ) -> Any:
            mask = positions.once_additive(hidden_states)
            if bias is None or bias.dim() != 2:
                return self.call(original, hidden_states, mask, memory, bias, cache, **options)
            matrix = RelativePositionBias(bias).dense(positions.n_q, positions.n_k, offset=positions.offset)
            matrix = matrix[None].to(hidden_states.dtype)
            if self.adds_once and mask is not None:
                matrix = matrix + mask
            out, _, *others = self.call(original, hidden_states, mask, memory, matrix, cache, **options)
            return out, bias, *others

        return host

    def rehearsal_of(self, module: Any) -> Callable[..., Any]:
        host = self.host_of(module)

        def on_copies(*args: Any, **options: Any) -> Any:
            *before, cache = args
            out, _, *others = host(*before, language_models.copy_of(cache), **options)
            return out, None, *others

        return on_copies
