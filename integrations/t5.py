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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashbias import RelativePositionBias, biased_attention
from flashbias.patches import Patch, PatchSet

from . import language_models
from .derived import Derived
from .integration import Integration, Replacement
from .language_models import KEPT, Positions, names

__all__ = ["INTEGRATION", "apply", "configure", "is_applied", "revert"]

_rows: Derived[Positions] = Derived()


def create_causal_mask(
    config: Any, attention_mask: Any, past_key_values: Any, cache_position: Any = None, **others: Any
) -> Any:
    """The function of that name in a model's module: a `Positions` in place of the mask."""
    tokens = _tokens(attention_mask, past_key_values)
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


def _tokens(mask: Any, cache: Any) -> Any:
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
    tokens = _tokens(attention_mask, past_key_values)
    if language_models.leaves("t5", self.config._attn_implementation, tokens):
        original = self.update_causal_mask_before_flashbias
        return original(attention_mask, input_tensor, cache_position, past_key_values, *others, **options)
    return Positions.with_older_cache(input_tensor, tokens, past_key_values, cache_position)


def _positions_of(hidden_states: Tensor, memory: Tensor | None, mask: Any) -> Positions | None:
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


Buckets = Callable[[Any, Tensor], Tensor]  # of distances, by what a layer knows


def _shared_buckets(module: Any, distance: Tensor) -> Tensor:
    """T5's, by a function that knows no layer."""
    return module._relative_position_bucket(
        distance,
        bidirectional=not module.is_decoder,
        num_buckets=module.relative_attention_num_buckets,
        max_distance=module.relative_attention_max_distance,
    )


def _own_buckets(module: Any, distance: Tensor) -> Tensor:
    """UMT5's, by a method."""
    return module._relative_position_bucket(distance)


def _table(module: Any, buckets: Buckets) -> Tensor:
    """The position bias of a layer by distance, `(H, 2 D - 1)` in fp32, which all layers of the stack then share."""
    reach = max(module.relative_attention_max_distance, module.relative_attention_num_buckets)
    distance = torch.arange(-reach, reach + 1, device=module.relative_attention_bias.weight.device)
    return module.relative_attention_bias(buckets(module, distance)).t().float()


def _heads(module: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, module.key_value_proj_dim)).transpose(1, 2)


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
            options = options | {"cache_position": None}
    source = hidden_states if memory is None else memory
    key, value = (_heads(module, project(source)) for project in (module.k, module.v))
    key, value = language_models.append(module, own, key, value, options)
    if both and memory is not None:
        cache.is_updated[module.layer_idx] = True
    return key, value


def attention(
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
        table = _table(module, buckets)
    bias = None if table is None else RelativePositionBias(table)
    out = biased_attention(query, key, value, bias, mask=positions.mask(), scale=1.0)
    assert isinstance(out, Tensor)
    return module.o(out.transpose(1, 2).flatten(2)), table


def _not_covered(
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
class _Attention(Replacement):
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
            placed = _positions_of(hidden_states, memory, mask)
            mask = mask if placed is None else placed
        if not isinstance(mask, Positions):  # the model's call was left to the host
            return self.call(getattr(module, self.original), hidden_states, mask, *args, **options)
        return super().__call__(module, hidden_states, mask, *args, **options)

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


def _t5(name: str) -> PatchSet:
    """T5, or mT5, which has a copy of it: a layer's position bias is the next one's."""
    module = f"transformers.models.{name.lower()}.modeling_{name.lower()}"
    interface = names(module, "eager_attention_forward")

    def compute(*args: Any, **options: Any) -> tuple[Any, ...]:
        out, table = attention(_shared_buckets, *args, **options)
        return (out, table, None) if interface else (out, table)

    def call(
        original: Any, hidden_states: Tensor, mask: Any, memory: Any, bias: Any, cache: Any, **options: Any
    ) -> Any:
        given = {"mask": mask, "key_value_states": memory, "position_bias": bias, "past_key_values": cache}
        return original(hidden_states, **given, **options)

    rows = not names(module, "create_bidirectional_mask")
    replacement = _Attention(f"t5: {name}", compute, _not_covered, KEPT, call, rows, not interface)

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
        return attention(_own_buckets, *args, **options)[0], None

    def call(
        original: Any, hidden_states: Tensor, mask: Any, memory: Any, bias: Any, cache: Any, **options: Any
    ) -> Any:
        given = {"encoder_hidden_states": memory, "past_key_values": cache, "attention_mask": mask}
        return original(hidden_states, **given, **options)

    rows = not names(module, "create_bidirectional_mask")
    replacement = _Attention("t5: UMT5", compute, _not_covered, KEPT, call, rows, False)

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
