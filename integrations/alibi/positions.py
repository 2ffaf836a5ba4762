"""What a host's masks and ALiBi tensor say, in memory that grows with N: made once in each call of a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flashbias import ALiBi, Bias, DenseBias
from flashbias.integrations import language_models
from flashbias.prepared import Prepared


@dataclass
class Positions(language_models.Positions):
    """The positions of a call, with ALiBi's.

    slopes: `(H,)` fp32, the same for all layers, or None where they are the layer's. q_positions, k_positions: for
    ALiBi, `(*batch, N)`, or None where the keys' order says all.
    """

    slopes: Tensor | None = None
    q_positions: Tensor | None = None
    k_positions: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Bias | None = None) -> Tensor:
        """Attention of `(*batch, H, N, C)`, with a layer's own bias if it has one; a single query's has its padding."""
        known: Prepared | None = self.made.get("attention")
        if known is None or known.scale != scale or known.bias is not (bias or self.made.get("bias")):
            bias = self.once("bias", self.bias) if bias is None else bias
            mask = self.once("mask", self.mask if self.n_q > 1 else self.causality)
            known = Prepared(bias, mask, scale)
            if not torch.compiler.is_compiling():
                self.made["attention"] = known
        return known(query, key, value)

    def bias(self) -> Bias:
        """ALiBi of the layers' common slopes."""
        assert self.slopes is not None
        return self.alibi(self.slopes)

    def alibi(self, slopes: Tensor) -> Bias:
        """ALiBi of slopes `(H,)`; of a single query that padding stands before, as a row."""
        if self.n_q > 1 or self.k_ids is None:
            return ALiBi(slopes, q_positions=self.q_positions, k_positions=self.k_positions)
        if self.q_positions is None or self.k_positions is None:
            assert self.offset is not None
            distance = torch.arange(self.n_k, device=slopes.device) - self.offset
        else:
            distance = self.k_positions - self.q_positions
        return self.row(slopes[:, None] * distance[..., None, :])

    def row(self, values: Tensor) -> DenseBias:
        """The bias of a single query, `(*batch, H, 1, Nk)` from values `(*batch, H, Nk)` in fp32, and its padding.

        It is no larger than positions of each head would be, and one tensor in place of slopes, positions and ids:
        where few keys are read, each costs the host of every layer more than reading it costs the device.
        """
        if self.k_ids is not None:
            values = values.masked_fill(self.k_ids[..., None, :] != 0, -torch.inf)
        # In memory whose rows lie as the operator wants them: it would copy others in every layer.
        return DenseBias(F.pad(values, (0, -self.n_k % 16))[..., None, : self.n_k])


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
    assert positions.offset is not None
    return of_keys[..., positions.offset : positions.offset + positions.n_q]
