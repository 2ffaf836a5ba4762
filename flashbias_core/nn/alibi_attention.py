"""Self-attention with ALiBi (Press et al., 2022): projections, bias and cache.

attention = ALiBiAttention(1600, 50)  # GPT-2-sized: 50 heads of head dim 32
out = attention(torch.randn(2, 4096, 1600))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flashbias.attention import biased_attention
from flashbias.biases import ALiBi
from flashbias.errors import ShapeError
from flashbias.masks import Both, Causal, Mask, Segments


def alibi_slopes(heads: int, device: torch.device | str | None = None) -> Tensor:
    """The slopes of ALiBi, `(H,)` fp32 (Press et al., section 3; BLOOM and Falcon have the same).

    For a power of two the geometric sequence `2^(-8 h / H)`, h = 1 ... H; for other numbers that of the next lower
    power, then every other one of the next higher power.
    """
    power = 1 << (heads.bit_length() - 1)
    steps = torch.arange(1, power + 1, device=device, dtype=torch.float32) * (-8 / power)
    if power < heads:
        others = torch.arange(1, 2 * (heads - power), 2, device=device, dtype=torch.float32) * (-4 / power)
        steps = torch.cat((steps, others))
    return torch.exp2(steps)


class KeyValueCache:
    """Keys and values of what has been read, for one `ALiBiAttention`; room for `capacity` positions.

    `length` positions are filled. Memory is taken at the first call that uses it.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write `(B, Hkv, N, C)` behind what is there; views of all that is there now.

        Raises ShapeError where the capacity does not suffice.
        """
        end = self.length + key.shape[-2]
        if end > self.capacity:
            raise ShapeError(
                f"{end} positions", f"at most the cache's capacity, {self.capacity}", "make the cache larger"
            )
        if self.key is None or self.value is None:
            shape = (*key.shape[:-2], self.capacity, key.shape[-1])
            self.key, self.value = key.new_zeros(shape), value.new_zeros(shape)
        self.key[..., self.length : end, :] = key
        self.value[..., self.length : end, :] = value
        self.length = end
        return self.key[..., :end, :], self.value[..., :end, :]


class ALiBiAttention(nn.Module):
    """Multi-head self-attention whose only knowledge of positions is ALiBi.

    Args:
        channels: of input and output; `channels // heads` is the head dim.
        heads: of the queries.
        kv_heads: of keys and values; divides heads, which are as many by default.
        bias: whether the projections have one.
        causal: attend to what came before; otherwise to both sides, with the distance's absolute value.
        learn_slopes: make the slopes a parameter. They start as `alibi_slopes(heads)` either way.

    Raises:
        ShapeError: where heads do not divide channels, or kv_heads do not divide heads.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        bias: bool = True,
        causal: bool = True,
        learn_slopes: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or channels % heads or heads % kv_heads:
            raise ShapeError(
                f"{channels} channels, {heads} heads and {kv_heads} heads of keys",
                "heads that divide channels, and kv_heads that divide heads",
                "change one of the three",
            )
        self.heads, self.kv_heads, self.head_dim, self.causal = heads, kv_heads, channels // heads, causal
        width = (heads + 2 * kv_heads) * self.head_dim
        self.qkv = nn.Linear(channels, width, bias=bias, device=device, dtype=dtype)
        self.out = nn.Linear(channels, channels, bias=bias, device=device, dtype=dtype)
        self.slopes = nn.Parameter(alibi_slopes(heads, device)) if learn_slopes else None
        self._place_slopes()

    def _place_slopes(self) -> None:
        """Fixed slopes, where the parameters lie and always in fp32: a buffer would be rounded by `.to(bfloat16)`."""
        self._fixed = alibi_slopes(self.heads, next(self.parameters()).device)

    def _apply(self, *args: Any, **options: Any) -> ALiBiAttention:
        super()._apply(*args, **options)
        self._place_slopes()
        return self

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, causal={self.causal}"

    def forward(self, x: Tensor, *, tokens: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """Attention of `x`, `(B, N, channels)`, in its shape.

        Args:
            tokens: booleans `(B, Nk)`, False at padding, wherever it lies: it is not attended to, and does not count
                as a position. Nk is N, or with a cache all that it holds after this call.
            cache: what came before `x`; `x` is appended.

        Raises:
            ShapeError: where tokens do not fit, or the cache is full.
        """
        batch, n, _ = x.shape
        sizes = (self.heads, self.kv_heads, self.kv_heads)
        query, key, value = (
            part.view(batch, n, -1, self.head_dim).transpose(1, 2)
            for part in self.qkv(x).split([size * self.head_dim for size in sizes], -1)
        )
        if cache is not None:
            key, value = cache.append(key, value)
        mask: Mask | None = Causal() if self.causal and n > 1 else None
        slopes = self._fixed if self.slopes is None else self.slopes
        if slopes.device != x.device:  # parameters were brought there one by one
            slopes = alibi_slopes(self.heads, x.device)
        bias = ALiBi(slopes, symmetric=not self.causal)
        if tokens is not None:
            positions = tokens.cumsum(-1, dtype=torch.int32) - 1
            k_ids = tokens.int() - 1
            bias = ALiBi(slopes, symmetric=not self.causal, q_positions=positions[:, -n:], k_positions=positions)
            padding = Segments(torch.zeros_like(k_ids[:, -n:]), k_ids)
            mask = padding if mask is None else Both(padding, mask)
        out = biased_attention(query, key, value, bias, mask=mask)
        assert isinstance(out, Tensor)
        return self.out(out.transpose(1, 2).flatten(2))
