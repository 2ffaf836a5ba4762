"""BLOOM: positions are counted over tokens, padding left out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashbias.integrations import language_models
from flashbias.nn import alibi_slopes
from flashbias.patches import Patch, PatchSet

from . import hosts
from .positions import Positions, count

MODULE = "transformers.models.bloom.modeling_bloom"


def create_causal_mask(config: Any, inputs_embeds: Tensor, attention_mask: Any, past_key_values: Any, **kw: Any) -> Any:
    """`modeling_bloom.create_causal_mask`: a `Positions` in place of the mask."""
    if hosts.leaves("BLOOM", config._attn_implementation, attention_mask):
        from transformers import masking_utils

        return masking_utils.create_causal_mask(
            config, inputs_embeds, attention_mask, past_key_values=past_key_values, **kw
        )
    return _count(Positions.with_cache(inputs_embeds, attention_mask, past_key_values), config, inputs_embeds.device)


def update_causal_mask(
    self: Any,
    attention_mask: Any,
    input_tensor: Tensor,
    cache_position: Tensor,
    past_key_values: Any,
    *others: Any,
    **options: Any,
) -> Any:
    """`BloomModel._update_causal_mask`: a `Positions` in place of the mask."""
    if hosts.leaves("BLOOM", self.config._attn_implementation, attention_mask):
        original = self.update_causal_mask_before_flashbias
        return original(attention_mask, input_tensor, cache_position, past_key_values, *others, **options)
    positions = Positions.with_older_cache(input_tensor, attention_mask, past_key_values, cache_position)
    return _count(positions, self.config, input_tensor.device)


def _count(positions: Positions, config: Any, device: torch.device) -> Positions:
    count(positions)
    positions.slopes = alibi_slopes(config.n_head, device)
    return positions


def attention(
    module: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Positions,
    layer_past: Any = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`BloomAttention.forward`: hidden states and residual `(B, N, channels)`."""
    query, key, value = language_models.split_heads(module.query_key_value(hidden_states), module.num_heads)
    key, value = language_models.append(module, layer_past, key, value, options)
    out = attention_mask.attend(query, key, value, module.inv_norm_factor)
    out = module.dense(language_models.join_heads(out))
    if module.training:
        out = F.dropout(out, module.hidden_dropout)
    return residual + out, None


def _not_covered(
    module: Any, hidden_states: Tensor, residual: Tensor, alibi: Tensor, attention_mask: Any, **options: Any
) -> str | None:
    if module.pretraining_tp > 1 and module.slow_but_exact:
        return "slow_but_exact"
    return language_models.not_covered(module, hidden_states, module.head_dim, module.attention_dropout, options)


def _mask_of(module: Any, positions: Positions, options: dict[str, Any]) -> Tensor:
    return positions.additive(options["alibi"])


_replacement = language_models.Attention("alibi: BLOOM", attention, _not_covered, language_models.KEPT, _mask_of)


def forward(
    self: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Any,
    layer_past: Any = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """`BloomAttention.forward`."""
    return _replacement(
        self, hidden_states, residual, alibi=alibi, attention_mask=attention_mask, layer_past=layer_past, **options
    )


HOST = PatchSet(
    Patch(
        f"{MODULE}:BloomAttention.forward",
        forward,
        ("self", "hidden_states", "residual", "alibi", "attention_mask", "layer_past"),
        keep_as=language_models.KEPT,
    ),
    Patch(
        f"{MODULE}:BloomModel._update_causal_mask",
        update_causal_mask,
        ("self", "attention_mask", "input_tensor", "cache_position", "past_key_values", "output_attentions"),
        keep_as="update_causal_mask_before_flashbias",
    )
    if not language_models.names(MODULE, "create_causal_mask")
    else Patch(
        f"{MODULE}:create_causal_mask",
        create_causal_mask,
        ("config", "inputs_embeds", "attention_mask", "past_key_values"),
    ),
    distribution="transformers",
    versions=language_models.VERSIONS,
    host="transformers' BLOOM",
)
