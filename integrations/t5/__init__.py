"""T5, mT5 and UMT5 of Hugging Face transformers 4.57 to 5.x: encoder, decoder, cross attention, `generate()`, training.

Importing this module patches the three, each at once or when it is imported; `revert()` undoes it. Weights, caches and
masks stay what they are. The buckets of relative positions become a table over distances, which reaches to where the
buckets end, and neither that bias nor a mask is ever made `(B, H, N, N)`; the gradient goes back through the table to
`relative_attention_bias`. The first layer of a stack makes the table, and passes it on in the place of the position
bias; a layer of UMT5 has its own.

A query that may attend nowhere gets 0; the hosts give it some mean of values. Left to the hosts' own code, said once in
the log: attention dropout in training (T5's configuration has 0.1: train with `dropout_rate=0` to be served; inference
has none), `output_attentions`, head masks, pruned heads, masks of other than two dimensions, other attention
implementations than eager and SDPA.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flashbias.integrations import language_models
from flashbias.integrations.integration import Integration
from flashbias.integrations.language_models import KEPT, names
from flashbias.patches import Patch, PatchSet

from .attention import Attention, attend, not_covered, own_buckets, shared_buckets
from .masks import create_bidirectional_mask, create_causal_mask, update_causal_mask

__all__ = ["INTEGRATION", "apply", "configure", "is_applied", "revert"]


def _t5(name: str) -> PatchSet:
    """T5, or mT5, which has a copy of it: a layer's position bias is the next one's."""
    module = f"transformers.models.{name.lower()}.modeling_{name.lower()}"
    interface = names(module, "eager_attention_forward")

    def compute(*args: Any, **options: Any) -> tuple[Any, ...]:
        out, table = attend(shared_buckets, *args, **options)
        return (out, table, None) if interface else (out, table)

    def call(
        original: Any, hidden_states: Tensor, mask: Any, memory: Any, bias: Any, cache: Any, **options: Any
    ) -> Any:
        given = {"mask": mask, "key_value_states": memory, "position_bias": bias, "past_key_values": cache}
        return original(hidden_states, **given, **options)

    rows = not names(module, "create_bidirectional_mask")
    replacement = Attention(f"t5: {name}", compute, not_covered, KEPT, call, rows, not interface)

    def forward(
        self: Any,
        hidden_states: Tensor,
        mask: Any = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> Any:
        """`T5Attention.forward`."""
        return replacement(self, hidden_states, mask, key_value_states, position_bias, past_key_values, **options)

    own = ("self", "hidden_states", "mask", "key_value_states", "position_bias", "past_key_values")
    return _host(name, module, Patch(f"{module}:{name}Attention.forward", forward, own, keep_as=KEPT))


def _umt5() -> PatchSet:
    """UMT5: every layer has a position bias of its own."""
    module = "transformers.models.umt5.modeling_umt5"

    def compute(*args: Any, **options: Any) -> tuple[Any, ...]:
        return attend(own_buckets, *args, **options)[0], None

    def call(
        original: Any, hidden_states: Tensor, mask: Any, memory: Any, bias: Any, cache: Any, **options: Any
    ) -> Any:
        given = {"encoder_hidden_states": memory, "past_key_values": cache, "attention_mask": mask}
        return original(hidden_states, **given, **options)

    rows = not names(module, "create_bidirectional_mask")
    replacement = Attention("t5: UMT5", compute, not_covered, KEPT, call, rows, False)

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        **options: Any,
    ) -> Any:
        """`UMT5Attention.forward`."""
        return replacement(self, hidden_states, attention_mask, encoder_hidden_states, None, past_key_values, **options)

    own = ("self", "hidden_states", "encoder_hidden_states", "past_key_values", "attention_mask")
    return _host("UMT5", module, Patch(f"{module}:UMT5Attention.forward", forward, own, keep_as=KEPT))


def _host(name: str, module: str, layer: Patch) -> PatchSet:
    """A host whose layers are patched, and whatever it makes masks with."""
    patches = [layer]
    own: tuple[str, ...]
    if names(module, "create_bidirectional_mask"):
        own = ("config", "attention_mask", "encoder_hidden_states")
        patches.append(Patch(f"{module}:create_bidirectional_mask", create_bidirectional_mask, own))
    if names(module, "create_causal_mask"):
        own = ("config", "attention_mask", "past_key_values")
        patches.append(Patch(f"{module}:create_causal_mask", create_causal_mask, own))
    else:
        own = ("self", "attention_mask", "input_tensor", "cache_position", "past_key_values")
        kept = "update_causal_mask_before_flashbias"
        patches.append(Patch(f"{module}:{name}Stack._update_causal_mask", update_causal_mask, own, keep_as=kept))
    return PatchSet(
        *patches,
        distribution="transformers",
        versions=language_models.VERSIONS,
        host=f"transformers' {name}",
    )


INTEGRATION = Integration("t5", _t5("T5"), _t5("MT5"), _umt5())
apply, revert, is_applied = INTEGRATION.apply, INTEGRATION.revert, INTEGRATION.is_applied


def configure() -> None:
    """There is nothing to choose; every integration has this function."""


INTEGRATION.apply_when_imported()
