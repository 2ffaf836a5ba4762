"""What a host's masks and ALiBi tensor say, in memory that grows with N: made once in each call of a model.

The hosts make a mask `(B, 1, Nq, Nk)` and pass it to every layer. Here the layers get a `Positions` in its place, from
which that mask can be made for a layer that has to run the host's own code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashbias import ALiBi, Causal, Mask, Segments, biased_attention
from flashbias.integrations.derived import readable
from flashbias.masks import Both

# Queries. To look whether all tokens count, a call waits for the device; where it is long that is nothing beside what
# it saves, since attention whose positions are the keys' order takes half the time.
LONG = 256


@dataclass
class Positions:
    """Where the queries and keys of a call stand, and which keys count.

    n_q, n_k: how many there are. offset: query i attends to keys `j <= i + offset`; a tensor for a cache whose length
    only the device knows. k_ids: `(B, Nk)` int32, 0 or -1 at padding, or None where every key counts.
    slopes: `(H,)` fp32, the same for all layers, or None where they are the layer's. q_positions, k_positions: for
    ALiBi, `(*batch, N)`, or None where the keys' order says all.
    """

    n_q: int
    n_k: int
    offset: int | Tensor
    k_ids: Tensor | None
    slopes: Tensor | None = None
    q_positions: Tensor | None = None
    k_positions: Tensor | None = None

    ndim = 0  # Falcon adds its ALiBi tensor to what has four dimensions

    def to(self, target: Any = None, *args: Any, **kwargs: Any) -> Positions:
        """This, on another device; a dtype, which a mask would be brought to, says nothing here."""
        if isinstance(target, (str, int, torch.device)):
            for name in ("offset", "k_ids", "slopes", "q_positions", "k_positions"):
                value = getattr(self, name)
                if isinstance(value, Tensor):
                    setattr(self, name, value.to(target))
        return self

    def bool(self) -> Positions:
        """This: MPT makes its mask boolean."""
        return self

    def mask(self) -> Mask | None:
        """Padding and causality, as far as they hide anything."""
        segments = causal = None
        if self.k_ids is not None:
            segments = Segments(self.k_ids.new_zeros(self.n_q), self.k_ids)
        if isinstance(self.offset, Tensor) or self.n_q > 1 or self.offset + 1 < self.n_k:
            causal = Causal(self.offset)
        return Both(segments, causal) if segments is not None and causal is not None else segments or causal

    def allowed(self, device: torch.device) -> Tensor:
        """Where a query attends: booleans `(B or 1, 1, Nq, Nk)`."""
        mask = self.mask()
        allowed = torch.ones((), dtype=torch.bool, device=device)
        allowed = allowed if mask is None else mask.dense(self.n_q, self.n_k, device=device)
        return allowed[(None,) * (4 - allowed.dim())].expand(-1, 1, self.n_q, self.n_k)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, slopes: Tensor | None = None) -> Tensor:
        """Attention of `(*batch, H, N, C)`, with a layer's own slopes if it has some."""
        slopes = self.slopes if slopes is None else slopes
        assert slopes is not None
        bias = ALiBi(slopes, q_positions=self.q_positions, k_positions=self.k_positions)
        out = biased_attention(query, key, value, bias, mask=self.mask(), scale=scale)
        assert isinstance(out, Tensor)
        return out


def place(n_q: int, n_k: int, offset: int | Tensor, tokens: Tensor | None, device: torch.device) -> Positions:
    """The positions of a call; `tokens` `(B, up to Nk)` are not 0 where a key counts, and a cache has spare room."""
    if isinstance(offset, Tensor):
        offset = offset.to(device) + 0  # a static cache writes to it in its next update
    k_ids = None
    if tokens is not None:
        counts = tokens != 0
        tokens = None if n_q >= LONG and readable(counts) and bool(counts.all()) else counts.to(device)
    if tokens is not None:
        k_ids = F.pad(tokens, (0, n_k - tokens.shape[-1])).int() - 1
    return Positions(n_q, n_k, offset, k_ids)


def count(positions: Positions) -> None:
    """Have positions counted over tokens, padding left out, as BLOOM and Falcon do."""
    if positions.k_ids is not None:
        positions.k_positions = positions.k_ids.add(1).cumsum(-1, dtype=torch.int32) - 1
        positions.q_positions = at_queries(positions, positions.k_positions)


def at_queries(positions: Positions, of_keys: Tensor) -> Tensor:
    """What stands at the keys `(..., Nk)`, at those of the queries, `(..., Nq)`."""
    if isinstance(positions.offset, Tensor):
        index = torch.arange(positions.n_q, device=of_keys.device) + positions.offset
        return of_keys.index_select(-1, index)
    return of_keys[..., positions.offset : positions.offset + positions.n_q]
