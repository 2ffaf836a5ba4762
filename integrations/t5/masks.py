"""What the models make in place of masks: where queries and keys stand, and which keys count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashbias.integrations import language_models
from flashbias.integrations.derived import Derived
from flashbias.integrations.language_models import Positions

_rows: Derived[Positions] = Derived()


def create_causal_mask(
    config: Any, attention_mask: Any, past_key_values: Any, cache_position: Any = None, **others: Any
) -> Any:
    """The function of that name in a model's module: a `Positions` in place of the mask."""
    tokens = tokens_of(attention_mask, past_key_values)
    if language_models.leaves("t5", config._attn_implementation, tokens):
        from transformers import masking_utils

        if cache_position is not None:
            others["cache_position"] = cache_position
        return masking_utils.create_causal_mask(
            config=config, attention_mask=attention_mask, past_key_values=past_key_values, **others
        )
    inputs = _inputs(others)
    if cache_position is not None:
        return Positions.with_older_cache(inputs, tokens, past_key_values, cache_position)
    return Positions.with_cache(inputs, tokens, past_key_values)


def create_bidirectional_mask(
    config: Any, attention_mask: Any, encoder_hidden_states: Any = None, **others: Any
) -> Any:
    """The function of that name in a model's module: a `Positions` in place of the mask."""
    if language_models.leaves("t5", config._attn_implementation, attention_mask):
        from transformers import masking_utils

        return masking_utils.create_bidirectional_mask(
            config=config, attention_mask=attention_mask, encoder_hidden_states=encoder_hidden_states, **others
        )
    inputs = _inputs(others)
    keys = inputs if encoder_hidden_states is None else encoder_hidden_states
    return Positions.place(inputs.shape[1], keys.shape[1], None, attention_mask, inputs.device)


def tokens_of(mask: Any, cache: Any) -> Any:
    """A mask `(B, Nk)` in place of `(B, 1, 1, Nk)`, which `generate()` makes ahead where a cache is static."""
    return _row_of(mask) if getattr(cache, "is_compileable", False) else mask


def _row_of(mask: Any) -> Any:
    """Which keys count, `(B, Nk)`, of a mask `(B, 1, 1, Nk)`, booleans or numbers to add; any other as it is."""
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != 1:
        return mask
    return mask[:, 0, 0] if mask.dtype == torch.bool else mask[:, 0, 0] == 0


def _inputs(options: dict[str, Any]) -> Tensor:
    return options["inputs_embeds"] if "inputs_embeds" in options else options["input_embeds"]


def update_causal_mask(
    self: Any, attention_mask: Any, input_tensor: Tensor, cache_position: Tensor, past_key_values: Any, *others: Any,
    **options: Any,
) -> Any:  # fmt: skip
    """`_update_causal_mask` of a stack, in older versions: a `Positions` in place of the mask."""
    tokens = tokens_of(attention_mask, past_key_values)
    if language_models.leaves("t5", self.config._attn_implementation, tokens):
        original = self.update_causal_mask_before_flashbias
        return original(attention_mask, input_tensor, cache_position, past_key_values, *others, **options)
    return Positions.with_older_cache(input_tensor, tokens, past_key_values, cache_position)


def positions_of(hidden_states: Tensor, memory: Tensor | None, mask: Any) -> Positions | None:
    """What a mask says that an older host has made for attention to both sides, `(B, 1, 1, Nk)`; None for others."""
    n_q, n_k = hidden_states.shape[1], (hidden_states if memory is None else memory).shape[1]

    def make() -> Positions:
        tokens = None if mask is None else _row_of(mask)
        return Positions.place(n_q, n_k, None, tokens, hidden_states.device)

    if mask is None:
        return make()
    if language_models.leaves("t5", "eager", _row_of(mask)):
        return None
    return _rows.get(mask, [mask], (n_q, n_k), make)
