"""MPT: positions are those of the keys, padding included; slopes from the host's own ALiBi tensor.

The host refuses more keys than `max_seq_len`; here any number will do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashbias import Bias
from flashbias.integrations import language_models
from flashbias.integrations.integration import say_once
from flashbias.patches import Patch, PatchSet

from . import hosts
from .positions import Positions

MODULE = "transformers.models.mpt.modeling_mpt"

_host_only: list[bool] = []  # not empty inside a call of a model that is left to the host


def create_causal_mask(config: Any, inputs_embeds: Tensor, attention_mask: Any, past_key_values: Any, **kw: Any) -> Any:
    """`modeling_mpt.create_causal_mask`: a `Positions` in place of the mask."""
    tokens = _tokens_of(attention_mask)
    if _host_only or hosts.leaves("MPT", hosts.NAME, tokens):
        from transformers import masking_utils

        return masking_utils.create_causal_mask(
            config, inputs_embeds, attention_mask, past_key_values=past_key_values, **kw
        )
    return Positions.with_cache(inputs_embeds, tokens, past_key_values)


def _tokens_of(mask: Any) -> Any:
    """Where one query attends, `(B, Nk)`, of a mask `(B, 1, 1, Nk)`, not 0 at hidden keys; any other as it is.

    For static caches `generate()` makes the masks ahead. Here, where padding has positions too, one row says all.
    """
    return mask[:, 0, 0] == 0 if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1:3] == (1, 1) else mask


def prepare_causal_mask(
    attention_mask: Any, input_shape: Any, inputs_embeds: Tensor, past_key_values_length: Any, *others: Any
) -> Any:
    """`_prepare_4d_causal_attention_mask`: a `Positions` in place of the mask. Static caches never worked there."""
    if _host_only or hosts.leaves("MPT", hosts.NAME, attention_mask) or isinstance(past_key_values_length, Tensor):
        from transformers import modeling_attn_mask_utils

        return modeling_attn_mask_utils._prepare_4d_causal_attention_mask(
            attention_mask, input_shape, inputs_embeds, past_key_values_length, *others
        )
    n_q = input_shape[1]
    return Positions.place(
        n_q, past_key_values_length + n_q, past_key_values_length, attention_mask, inputs_embeds.device
    )


def attention(
    module: Any,
    hidden_states: Tensor,
    position_bias: Tensor,
    past_key_values: Any,
    attention_mask: Positions,
    **options: Any,
) -> tuple[Tensor, None]:
    """`MptAttention.forward`: hidden states `(B, N, channels)`, position_bias `(H, 1, max_seq_len)`."""
    qkv = module.Wqkv(hidden_states)
    if module.clip_qkv:
        qkv = qkv.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    batch, n, _ = qkv.shape
    query, key, value = qkv.view(batch, n, 3, module.n_heads, module.head_dim).transpose(1, 3).unbind(2)
    key, value = language_models.append(module, past_key_values, key, value, options)
    out = attention_mask.attend(query, key, value, module.softmax_scale, _bias(attention_mask, position_bias))
    return module.out_proj(language_models.join_heads(out)), None


def _bias(positions: Positions, position_bias: Tensor) -> Bias:
    """ALiBi of the steps of the host's tensor: once for all layers, since the model gives all of them that one."""
    known, bias = positions.made.get("position_bias", (None, None))
    if known is not position_bias:
        bias = positions.alibi(position_bias[:, 0, -1] - position_bias[:, 0, -2])
        if not torch.compiler.is_compiling():
            positions.made["position_bias"] = position_bias, bias
    return bias


def _not_covered(
    module: Any,
    hidden_states: Tensor,
    position_bias: Tensor | None,
    past_key_values: Any,
    attention_mask: Any,
    **options: Any,
) -> str | None:
    if position_bias is None or position_bias.shape[-1] < 2:
        return "a position bias of less than two keys"
    return language_models.not_covered(module, hidden_states, module.head_dim, module.attn_dropout_p, options)


def _mask_of(module: Any, positions: Positions, options: dict[str, Any]) -> Tensor:
    return ~positions.allowed(options["position_bias"].device)


_replacement = language_models.Attention("alibi: MPT", attention, _not_covered, language_models.KEPT, _mask_of)


def forward(
    self: Any,
    hidden_states: Tensor,
    position_bias: Tensor,
    past_key_values: Any = None,
    attention_mask: Any = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """`MptAttention.forward`."""
    return _replacement(
        self,
        hidden_states,
        position_bias=position_bias,
        past_key_values=past_key_values,
        attention_mask=attention_mask,
        **options,
    )


def model_forward(self: Any, *args: Any, **options: Any) -> Any:
    """`MptModel.forward`: it tells neither masks nor layers what was asked of it."""
    wanted = options.get("output_attentions")
    wanted = self.config.output_attentions if wanted is None else wanted
    if wanted:
        say_once("alibi: MPT: output_attentions is not covered, the host's own code computes it")
    if not wanted and not hosts.leaves("MPT", self.config._attn_implementation, None):
        return self.forward_before_flashbias(*args, **options)
    _host_only.append(True)
    try:
        return self.forward_before_flashbias(*args, **options)
    finally:
        _host_only.pop()


HOST = PatchSet(
    Patch(
        f"{MODULE}:MptAttention.forward",
        forward,
        ("self", "hidden_states", "position_bias", "past_key_values", "attention_mask"),
        keep_as=language_models.KEPT,
    ),
    Patch(
        f"{MODULE}:MptModel.forward",
        model_forward,
        ("self",),
        keep_as=language_models.KEPT,
    ),
    Patch(
        f"{MODULE}:_prepare_4d_causal_attention_mask",
        prepare_causal_mask,
        ("attention_mask", "input_shape", "inputs_embeds", "past_key_values_length", "sliding_window"),
    )
    if not language_models.names(MODULE, "create_causal_mask")
    else Patch(
        f"{MODULE}:create_causal_mask",
        create_causal_mask,
        ("config", "inputs_embeds", "attention_mask", "past_key_values"),
    ),
    distribution="transformers",
    versions=language_models.VERSIONS,
    host="transformers' MPT",
)
