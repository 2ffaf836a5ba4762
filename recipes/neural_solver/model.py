"""The library's model `Transformer_Spatial_Bias`, small and in plain torch, with attention that can be exchanged.

Parameters have the library's names and shapes, so that weights go from one to the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# From the points `(B, N, d)` what all layers share; then from a layer, its input `(B, N, dim)` and that, the output.
Prepare = Callable[[Tensor], Any]
Attend = Callable[["Attention", Tensor, Any], Tensor]


@dataclass(frozen=True)
class Shape:
    """Of a model: points have `space` coordinates and `features` beside them."""

    space: int
    features: int
    outputs: int
    layers: int = 8
    hidden: int = 128
    heads: int = 8
    mlp_ratio: int = 1


# As in the library's scripts.
ELASTICITY = Shape(space=2, features=0, outputs=1)
CAR = Shape(space=3, features=7, outputs=4, mlp_ratio=2)


class Attention(nn.Module):
    """The layers of `Spatial_Bias_Attention`; what is done with them is the variant's."""

    def __init__(self, shape: Shape, attend: Attend) -> None:
        super().__init__()
        self.heads, self.dim_head = shape.heads, shape.hidden // shape.heads
        self.scale, self.attend = self.dim_head**-0.5, attend
        self.to_q, self.to_k, self.to_v = (nn.Linear(shape.hidden, shape.hidden, bias=False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(shape.hidden, shape.hidden), nn.Dropout(0.0))
        self.pos_weight = nn.Linear(self.dim_head, 1, bias=False)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key and value `(B, H, N, C)`, and the weights of the distances `(B, H, N)`."""
        by_head = (self.heads, self.dim_head)
        weight = self.pos_weight(x.unflatten(-1, by_head)).squeeze(-1).transpose(1, 2)
        query, key, value = (
            layer(x).unflatten(-1, by_head).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        return query, key, value, weight

    def joined(self, out: Tensor) -> Tensor:
        """The output of the layer from that of the heads, `(B, H, N, C)`."""
        return self.to_out(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, prepared: Any) -> Tensor:
        return self.attend(self, x, prepared)


class Perceptron(nn.Module):
    """Two linear layers, by the library's names."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.linear_pre = nn.Sequential(nn.Linear(inputs, hidden), nn.GELU())
        self.linear_post = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_post(self.linear_pre(x))


class Block(nn.Module):
    """Attention and perceptron; the last one maps to the outputs."""

    def __init__(self, shape: Shape, attend: Attend, last: bool) -> None:
        super().__init__()
        self.ln_1, self.Attn = nn.LayerNorm(shape.hidden), Attention(shape, attend)
        self.ln_2 = nn.LayerNorm(shape.hidden)
        self.mlp = Perceptron(shape.hidden, shape.hidden * shape.mlp_ratio, shape.hidden)
        self.last = last
        if last:
            self.ln_3, self.mlp2 = nn.LayerNorm(shape.hidden), nn.Linear(shape.hidden, shape.outputs)

    def forward(self, x: Tensor, prepared: Any) -> Tensor:
        x = self.Attn(self.ln_1(x), prepared) + x
        x = self.mlp(self.ln_2(x)) + x
        return self.mlp2(self.ln_3(x)) if self.last else x


class Solver(nn.Module):
    """Points `(B, N, space)` and features `(B, N, features)` or None, to outputs `(B, N, outputs)`."""

    def __init__(self, shape: Shape, prepare: Prepare, attend: Attend) -> None:
        super().__init__()
        self.prepare = prepare
        self.preprocess = Perceptron(shape.space + shape.features, 2 * shape.hidden, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape, attend, i == shape.layers - 1) for i in range(shape.layers))
        self.placeholder = nn.Parameter(torch.rand(shape.hidden) / shape.hidden)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, points: Tensor, features: Tensor | None) -> Tensor:
        prepared = self.prepare(points)
        x = points if features is None else torch.cat((points, features), -1)
        x = self.preprocess(x) + self.placeholder
        for block in self.blocks:
            x = block(x, prepared)
        return x


def host_model(checkout: Any, shape: Shape) -> nn.Module:
    """The checkout's own model of that shape; whether it is patched is not decided here."""
    import importlib
    import sys
    from types import SimpleNamespace

    from flashbias.integrations._torchvision import make_importable

    make_importable()
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    host = importlib.import_module("models.Transformer_Spatial_Bias")
    options = SimpleNamespace(
        unified_pos=0, geotype="unstructured", time_input=False, act="gelu", dropout=0.0,
        fun_dim=shape.features, space_dim=shape.space, out_dim=shape.outputs, n_layers=shape.layers,
        n_hidden=shape.hidden, n_heads=shape.heads, mlp_ratio=shape.mlp_ratio,
    )  # fmt: skip
    return host.Model(options)
