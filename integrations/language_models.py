"""What language models of transformers share: their masks in O(N) memory, their caches, and how calls are handed back.

Of transformers 4.57 to 5.x. At first the models made their masks themselves, later all by the library's
`create_causal_mask` and `create_bidirectional_mask`: `names` tells whether a model's module knows one of these. The
hosts make a mask `(B, 1, Nq, Nk)` and pass it to every layer. Here the layers get a `Positions` in its place, from
which that mask can be made for a layer that has to run the host's own code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flashbias import Causal, Mask, Segments
from flashbias.masks import Both
from flashbias.patches.source import find_source

from .derived import readable
from .integration import Replacement, is_hooked, not_computable, say_once

NAME = "factored_bias"  # of the attention, for `attn_implementation=`
VERSIONS = ">=4.57.1,<6"  # 4.57.0 has been withdrawn
KEPT = "forward_before_flashbias"

# Queries. To look whether all tokens count, a call waits for the device; where it is long that is nothing beside what
# it saves, since attention whose positions are the keys' order takes half the time.
LONG = 256

P = TypeVar("P", bound="Positions")
T = TypeVar("T")


def names(module: str, function: str) -> bool:
    """Whether the source of a model's module, which is not imported for that, has a function's name."""
    file = find_source(module)
    return file is not None and function in file.read_text(encoding="utf-8")


def leaves(who: str, implementation: str, tokens: Any) -> bool:
    """Whether a model's call is left to the host, said once."""
    reason = None
    if implementation not in ("eager", "sdpa", NAME):
        reason = f"attn_implementation={implementation!r}"
    if tokens is not None and (not isinstance(tokens, Tensor) or tokens.dim() != 2):
        reason = "an attention mask of other than two dimensions"
    if reason is not None:
        say_once(f"{who}: {reason} is not covered, the host's own code computes it")
    return reason is not None


@dataclass
class Positions:
    """Which keys of a call count, and up to where a query attends.

    n_q, n_k: how many there are. offset: query i attends to keys `j <= i + offset`; a tensor for a cache whose length
    only the device knows; None for attention to both sides. k_ids: `(B, Nk)` int32, 0 or -1 at padding, and q_ids,
    `(Nq,)` of 0, both None where every key counts. made: what one layer has computed and the others need too.
    """

    n_q: int
    n_k: int
    offset: int | Tensor | None
    k_ids: Tensor | None
    q_ids: Tensor | None = None
    made: dict[Any, Any] = field(default_factory=dict, kw_only=True)

    ndim = 0  # Falcon adds its ALiBi tensor to what has four dimensions

    @classmethod
    def place(
        cls: type[P], n_q: int, n_k: int, offset: int | Tensor | None, tokens: Tensor | None, device: torch.device
    ) -> P:
        """The positions of a call; `tokens` `(B, up to Nk)` are not 0 where a key counts; a cache has spare room."""
        if isinstance(offset, Tensor):
            offset = offset.to(device) + 0  # a static cache writes to it in its next update
        if tokens is not None:
            counts = tokens != 0
            tokens = None if n_q >= LONG and readable(counts) and bool(counts.all()) else counts.to(device)
        if tokens is None:
            return cls(n_q, n_k, offset, None)
        room = n_k - tokens.shape[-1]
        k_ids = (F.pad(tokens, (0, room)) if room else tokens).int() - 1
        return cls(n_q, n_k, offset, k_ids, k_ids.new_zeros(n_q))

    @classmethod
    def with_cache(cls: type[P], inputs: Tensor, tokens: Tensor | None, cache: Any) -> P:
        """Those of inputs `(B, N, channels)` behind a cache, or None, as later versions keep it."""
        n_q = inputs.shape[1]
        if cache is None:
            return cls.place(n_q, n_q if tokens is None else tokens.shape[-1], 0, tokens, inputs.device)
        n_k, _ = cache.get_mask_sizes(n_q, 0)
        return cls.place(n_q, n_k, cache.get_seq_length(), tokens, inputs.device)

    @classmethod
    def with_older_cache(cls: type[P], inputs: Tensor, tokens: Tensor | None, cache: Any, cache_position: Tensor) -> P:
        """The same for caches whose length the caller knows: `cache_position` `(N,)` are the places of the queries."""
        n_q = inputs.shape[1]
        if cache is not None and cache.is_compileable:
            return cls.place(n_q, cache.get_max_cache_shape(), cache_position[0], tokens, inputs.device)
        past = 0 if cache is None else cache.get_seq_length()
        n_k = past + n_q if tokens is None else tokens.shape[-1]
        return cls.place(n_q, n_k, n_k - n_q, tokens, inputs.device)

    def to(self: P, target: Any = None, *args: Any, **kwargs: Any) -> P:
        """This, on another device; a dtype, which a mask would be brought to, says nothing here."""
        if isinstance(target, (str, int, torch.device)):
            for name, value in list(vars(self).items()):
                if isinstance(value, Tensor):
                    setattr(self, name, value.to(target))
            self.made.clear()
        return self

    def bool(self: P) -> P:
        """This: MPT makes its mask boolean."""
        return self

    def mask(self) -> Mask | None:
        """Padding and causality, as far as they hide anything."""
        segments, causal = None, self.causality()
        if self.k_ids is not None and self.q_ids is not None:
            segments = Segments(self.q_ids, self.k_ids)
        return Both(segments, causal) if segments is not None and causal is not None else segments or causal

    def causality(self) -> Mask | None:
        """Up to where queries attend, where that hides anything."""
        if isinstance(self.offset, Tensor):
            return Causal(self.offset)
        hides = self.offset is not None and (self.n_q > 1 or self.offset + 1 < self.n_k)
        return Causal(self.offset) if hides else None

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What `make` returns, kept for the other layers; not in compiled graphs, where every layer is the first."""
        if torch.compiler.is_compiling():
            return make()
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def allowed(self, device: torch.device) -> Tensor:
        """Where a query attends: booleans `(B or 1, 1, Nq, Nk)`."""
        mask = self.mask()
        allowed = torch.ones((), dtype=torch.bool, device=device)
        allowed = allowed if mask is None else mask.dense(self.n_q, self.n_k, device=device)
        return allowed[(None,) * (4 - allowed.dim())].expand(-1, 1, self.n_q, self.n_k)

    def additive(self, like: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        """The mask as numbers to add: the bias where a query attends, elsewhere the lowest number of the dtype."""
        bias = torch.as_tensor(bias, dtype=like.dtype, device=like.device)
        return torch.where(self.allowed(like.device), bias, torch.finfo(like.dtype).min)

    def once_additive(self, like: Tensor) -> Tensor | None:
        """The same, made for the first layer that asks and kept for the others, or None where nothing is hidden."""
        if self.mask() is None:
            return None
        key = like.dtype, like.device
        if key not in self.made:
            self.made[key] = self.additive(like)
        return self.made[key]


@dataclass(frozen=True)
class Attention(Replacement):
    """A layer's attention: what it gets for a mask is a `Positions`, and it appends to a cache.

    `mask_of(module, positions, options)` makes the mask that the host's own code wants.
    """

    mask_of: Callable[[Any, Any, dict[str, Any]], Tensor] | None = None

    def __call__(self, module: Any, *args: Any, **options: Any) -> Any:
        if not isinstance(options["attention_mask"], Positions):  # the model's call was left to the host
            return getattr(module, self.original)(*args, **options)
        return super().__call__(module, *args, **options)

    def is_watched(self, *args: Any, **options: Any) -> bool:
        # Once for all layers: to read the environment takes as long as a view of a tensor.
        return options["attention_mask"].once("watched", super().is_watched)

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
            return host(*args, **{name: copy_of(value) for name, value in options.items()})

        return on_copies


def copy_of(value: Any) -> Any:
    """Of a cache, one that can be appended to without a trace in it; anything else as it is."""
    if hasattr(value, "is_updated"):  # of an encoder and decoder
        twin = copy.copy(value)
        twin.self_attention_cache = copy_of(value.self_attention_cache)
        twin.cross_attention_cache = copy_of(value.cross_attention_cache)
        twin.is_updated = dict(value.is_updated)
        return twin
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


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Query, key and value `(B, H, N, C)` of a projection `(B, N, H * 3 * C)`, by three views."""
    batch, n, width = qkv.shape
    return qkv.view(batch, n, heads, 3, width // (3 * heads)).transpose(1, 2).unbind(3)


def join_heads(out: Tensor) -> Tensor:
    """`(B, N, H * C)` of `(B, H, N, C)`."""
    return out.transpose(1, 2).flatten(2)


def not_covered(
    module: Any, x: Tensor, head_dim: int, dropout: float | torch.nn.Dropout, options: dict[str, Any]
) -> str | None:
    """Why the operator cannot take the place of this layer's attention, or None; its dropout as the layer has it."""
    if reason := not_computable(x, head_dim):
        return reason
    if options.get("output_attentions"):
        return "output_attentions"
    if options.get("head_mask") is not None:
        return "a head mask"
    rate, probe = (dropout.p, dropout) if isinstance(dropout, torch.nn.Dropout) else (dropout, None)
    if module.training and rate > 0:
        return "attention dropout in training"
    if probe is not None and is_hooked(probe):
        return "a hook on the attention weights, which are never made,"
    return None
