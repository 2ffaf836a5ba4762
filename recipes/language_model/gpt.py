"""A small GPT over bytes whose only knowledge of positions is ALiBi, and the ways to compute its attention."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashbias import FactoredBias, biased_attention
from flashbias.nn import ALiBiAttention, alibi_slopes

BYTES = 256
HELD_OUT = 0.1  # of the text, at its end


def _split(module: ALiBiAttention, x: Tensor) -> list[Tensor]:
    qkv = module.qkv(x).unflatten(-1, (3, module.heads, module.head_dim))
    return list(qkv.permute(2, 0, 3, 1, 4).unbind(0))


def stock(module: ALiBiAttention, x: Tensor) -> Tensor:
    """torch's attention with the bias as a matrix in the dtype of the query, added to the causal mask."""
    query, key, value = _split(module, x)
    positions = torch.arange(x.shape[1], device=x.device)
    distance = (positions[None, :] - positions[:, None]).float()
    bias = alibi_slopes(module.heads, x.device)[:, None, None] * distance
    bias = bias.masked_fill(distance > 0, -torch.inf).to(query.dtype)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias[None])
    return module.out(out.transpose(1, 2).flatten(2))


def in_half(dtype: torch.dtype) -> Callable[[ALiBiAttention, Tensor], Tensor]:
    """Factors `(slope) (j)` in a half precision, as the paper's example passes them: positions are rounded."""

    def attend(module: ALiBiAttention, x: Tensor) -> Tensor:
        query, key, value = _split(module, x)
        n = x.shape[1]
        q_factor = alibi_slopes(module.heads, x.device)[:, None, None].expand(-1, n, -1).to(dtype)
        k_factor = torch.arange(n, device=x.device)[None, :, None].to(dtype)
        out = biased_attention(query, key, value, FactoredBias(q_factor, k_factor), is_causal=True)
        assert isinstance(out, Tensor)
        return module.out(out.transpose(1, 2).flatten(2))

    return attend


WAYS: dict[str, Callable[[ALiBiAttention, Tensor], Tensor]] = {
    "torch": stock,
    "flashbias": lambda module, x: module(x),
    "factors in fp16": in_half(torch.float16),
    "factors in bf16": in_half(torch.bfloat16),
}


class Block(nn.Module):
    """Attention and a perceptron, each behind a normalisation."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attention = ALiBiAttention(channels, heads)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor, attend: Callable[[ALiBiAttention, Tensor], Tensor]) -> Tensor:
        x = x + attend(self.attention, self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Logits `(B, N, 256)` of the next bytes from bytes `(B, N)`."""

    def __init__(self, layers: int, channels: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, channels)
        self.blocks = nn.ModuleList(Block(channels, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(channels), nn.Linear(channels, BYTES)

    def forward(self, ids: Tensor, way: str) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, WAYS[way])
        return self.head(self.norm(x))


def corpus(path: Path | None, most: int = 8 * 10**6) -> tuple[Tensor, Tensor]:
    """Bytes to train on and bytes held out, of a text or of the standard library's sources in alphabetical order."""
    if path is not None:
        text = path.read_bytes()[:most]
    else:
        text = b""
        for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            text += file.read_bytes()
            if len(text) >= most:
                break
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    held_out = int(len(data) * HELD_OUT)
    return data[:-held_out], data[-held_out:]
