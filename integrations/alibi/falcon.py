"""Falcon with ALiBi: what its SDPA path computes (its eager path adds ALiBi twice).

The host rounds slopes, and slopes times positions, to bfloat16, whatever the model's dtype. A trained model knows no
other ALiBi, so each head here gets those products for its key positions: differences of them, in fp32, are exact.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashbias import Bias, DenseBias, FactoredBias
from flashbias.integrations import language_models
from flashbias.nn import alibi_slopes
from flashbias.patches import Patch, PatchSet

from . import hosts
from .positions import Positions, at_queries, count

MODULE = "transformers.models.falcon.modeling_falcon"


def create_causal_mask(config: Any, inputs_embeds: Tensor, attention_mask: Any, past_key_values: Any, **kw: Any) -> Any:
    """`modeling_falcon.create_causal_mask`: a `Positions` in place of the mask."""
    if not config.alibi or hosts.leaves("Falcon", config._attn_implementation, attention_mask):
        from transformers import masking_utils

        return masking_utils.create_causal_mask(
            config, inputs_embeds, attention_mask, past_key_values=past_key_values, **kw
        )
    return _round(Positions.with_cache(inputs_embeds, attention_mask, past_key_values), config, inputs_embeds.device)


def update_causal_mask(
    self: Any,
    attention_mask: Any,
    input_tensor: Tensor,
    cache_position: Tensor,
    past_key_values: Any,
    *others: Any,
    **options: Any,
) -> Any:
    """`FalconModel._update_causal_mask`: a `Positions` in place of the mask."""
    config = self.config
    if not config.alibi or hosts.leaves("Falcon", config._attn_implementation, attention_mask):
        original = self.update_causal_mask_before_flashbias
        return original(attention_mask, input_tensor, cache_position, past_key_values, *others, **options)
    positions = Positions.with_older_cache(input_tensor, attention_mask, past_key_values, cache_position)
    return _round(positions, config, input_tensor.device)


def _round(positions: Positions, config: Any, device: torch.device) -> Positions:
    """ALiBi as the host rounds it: in place of key positions products `(B, H, Nk)`, each head its own."""
    count(positions)
    places = positions.k_positions
    if places is None:
        places = torch.arange(positions.n_k, device=device)[None]
    slopes = alibi_slopes(config.num_attention_heads, device).bfloat16()
    positions.k_positions = slopes[:, None] * places[:, None, :]
    positions.q_positions = at_queries(positions, positions.k_positions)
    return positions


def attention(
    module: Any, hidden_states: Tensor, alibi: Tensor, attention_mask: Positions, layer_past: Any = None, **options: Any
) -> tuple[Tensor, None]:
    """`FalconAttention.forward`: hidden states `(B, N, channels)`."""
    query, key, value = _split_heads(module, module.query_key_value(hidden_states))
    key, value = language_models.append(module, layer_past, key, value, options)
    scale = module.inv_norm_factor
    if attention_mask.n_q == 1:
        bias: Bias = attention_mask.once("row", partial(_row, attention_mask, scale))
        out = attention_mask.attend(query, key, value, scale, bias)
    elif _is_factored(attention_mask, query, scale):
        bias = attention_mask.once("factors", partial(_factors, attention_mask, scale))
        out = attention_mask.attend(query, key, value, scale, bias)
    else:
        # Heads as a batch, because each has positions of its own.
        key, value = (part.expand(-1, module.num_heads, -1, -1).unsqueeze(2) for part in (key, value))
        by_head = attention_mask.once("by head", partial(_by_head, attention_mask, scale))
        out = by_head.attend(query.unsqueeze(2), key, value, scale).squeeze(2)
    return module.dense(language_models.join_heads(out)), None


def _split_heads(module: Any, qkv: Tensor) -> tuple[Tensor, ...]:
    if module.multi_query or module.new_decoder_architecture:
        return tuple(part.transpose(1, 2) for part in module._split_heads(qkv))
    return language_models.split_heads(qkv, module.num_heads)


def _is_factored(positions: Positions, query: Tensor, scale: float) -> bool:
    """Whether ALiBi goes into the scores by factors: where long calls are fastest so, and as exact.

    The products are, and so is their multiple by a power of two. What a factor of two columns adds to a score is as
    large as the longest distance, which costs fp32 digits that half precision does not have.
    """
    whole = positions.k_ids is None and not isinstance(positions.offset, Tensor)
    half = query.dtype.itemsize == 2
    return whole and half and positions.n_q >= language_models.LONG and math.frexp(scale)[0] == 0.5


def _row(positions: Positions, scale: float) -> DenseBias:
    """`scale * (p_j - p_i)` of a single query and the rounded products."""
    q_products, k_products = _products(positions)
    return positions.row((k_products.float() - q_products.float()) * scale)


def _factors(positions: Positions, scale: float) -> FactoredBias:
    """`scale * (p_j - p_i)` of the rounded products, by two columns."""
    q_products, k_products = _products(positions)
    q_factor = torch.stack((torch.ones_like(q_products), -q_products), -1) * scale
    return FactoredBias(q_factor, torch.stack((k_products, torch.ones_like(k_products)), -1))


def _by_head(positions: Positions, scale: float) -> Positions:
    """Positions `(B, H, N)` of attention whose heads are a batch, under one slope."""
    q_products, k_products = _products(positions)
    return Positions(
        positions.n_q,
        positions.n_k,
        positions.offset,
        None if positions.k_ids is None else positions.k_ids[:, None],
        positions.q_ids,
        torch.full((1,), scale, device=k_products.device),
        q_products.float(),
        k_products.float(),
    )


def _products(positions: Positions) -> tuple[Tensor, Tensor]:
    """Those of the queries and of the keys."""
    assert positions.q_positions is not None
    assert positions.k_positions is not None
    return positions.q_positions, positions.k_positions


def _not_covered(
    module: Any, hidden_states: Tensor, alibi: Tensor | None, attention_mask: Any, **options: Any
) -> str | None:
    if alibi is None:
        return "a model without ALiBi"
    return language_models.not_covered(module, hidden_states, module.head_dim, module.attention_dropout, options)


def _mask_of(module: Any, positions: Positions, options: dict[str, Any]) -> Tensor:
    alibi = options["alibi"].unflatten(0, (-1, module.num_heads)) * module.inv_norm_factor
    by_sdpa = module.config._attn_implementation == "sdpa" and not options.get("output_attentions")
    if by_sdpa and options.get("head_mask") is None:
        return positions.additive(alibi, alibi)
    return positions.additive(alibi)  # the eager path adds ALiBi once more than its mask does


_replacement = language_models.Attention("alibi: Falcon", attention, _not_covered, language_models.KEPT, _mask_of)


def forward(
    self: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Any,
    position_ids: Any = None,
    layer_past: Any = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """`FalconAttention.forward`."""
    return _replacement(
        self,
        hidden_states,
        alibi=alibi,
        attention_mask=attention_mask,
        position_ids=position_ids,
        layer_past=layer_past,
        **options,
    )


HOST = PatchSet(
    Patch(
        f"{MODULE}:FalconAttention.forward",
        forward,
        ("self", "hidden_states", "alibi", "attention_mask", "position_ids", "layer_past"),
        keep_as=language_models.KEPT,
    ),
    Patch(
        f"{MODULE}:FalconModel._update_causal_mask",
        update_causal_mask,
        ("self", "attention_mask", "input_tensor", "cache_position", "past_key_values", "output_attentions", "alibi"),
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
    host="transformers' Falcon with ALiBi",
)
