"""`attn_implementation="factored_bias"`: for the models of this integration, and for all that ask for it by interface.

The latter get exact attention with their masks and position biases, but nothing that is specific to ALiBi.
"""

from __future__ import annotations

from typing import Any

import torch
import wrapt
from torch import Tensor

from flashbias import Bias, Causal, DenseBias, Mask, biased_attention
from flashbias.errors import UnsupportedError
from flashbias.integrations.integration import say_once

from . import bloom, falcon, mpt
from .hosts import NAME

# Their own code adds the mask, where it runs; everybody else gets booleans.
_ADDING = ("bloom", "mpt", "falcon")


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' interface wants it: `(B, H, N, C)` in, `(B, N, H, C)` out, no weights.

    attention_mask: `(B, 1 or H, Nq, Nk)`, booleans, or numbers to add.

    Raises UnsupportedError for attention sinks and for capped scores, which would change the result.
    """
    for name in ("softcap", "s_aux"):
        if options.get(name) is not None:
            raise UnsupportedError(
                f"{name} in the attention of {type(module).__name__}", "attention without it", "use another one"
            )
    if dropout > 0:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        say_once("alibi: attention dropout is not covered, torch's attention computes it")
        if position_bias is not None:
            options["position_bias"] = position_bias
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **options
        )
    bias: Bias | None = None if position_bias is None else DenseBias(position_bias)
    mask: Mask | Tensor | None = None
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        # As torch's: from the first key on, and not while decoding.
        mask = Causal(0) if causal and query.shape[-2] > 1 else None
    elif attention_mask.dtype == torch.bool:
        mask = attention_mask[..., : key.shape[-2]]
    else:
        numbers = DenseBias(attention_mask[..., : key.shape[-2]])
        bias = numbers if bias is None else bias + numbers
    out = biased_attention(query, key, value, bias, mask=mask, scale=scaling)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None


def mask(*args: Any, config: Any = None, **options: Any) -> Tensor | None:
    """The mask `(B, 1, Nq, Nk)` of a model, always made: without one, attention would not know what is padding."""
    from transformers import masking_utils

    if getattr(config, "model_type", None) in _ADDING:
        return masking_utils.eager_mask(*args, config=config, **options)
    options.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return masking_utils.sdpa_mask(*args, config=config, **options)


def register() -> None:
    """Make the name known to transformers as soon as that is imported; it stays known when patches are reverted."""

    @wrapt.when_imported("transformers.modeling_utils")
    def _attention(module: Any) -> None:
        module.AttentionInterface.register(NAME, attention)

    @wrapt.when_imported("transformers.masking_utils")
    def _mask(module: Any) -> None:
        module.AttentionMaskInterface.register(NAME, mask)

    @wrapt.when_imported(falcon.MODULE)
    def _falcon(module: Any) -> None:
        module.FALCON_ATTENTION_CLASSES.setdefault(NAME, module.FalconAttention)


HOSTS = (bloom.HOST, mpt.HOST, falcon.HOST)
