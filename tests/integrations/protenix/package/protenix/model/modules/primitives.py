"""A stand-in for Protenix' `Transition`: in inference rows of many are taken in parts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PARTS, LONG = 8, 3200


class Transition(nn.Module):
    def __init__(self, c_in: int, n: int) -> None:
        super().__init__()
        self.c_in, self.n = c_in, n
        self.layernorm1 = nn.LayerNorm(c_in)
        self.linear_no_bias_a = nn.Linear(c_in, n * c_in, bias=False)
        self.linear_no_bias_b = nn.Linear(c_in, n * c_in, bias=False)
        self.linear_no_bias = nn.Linear(n * c_in, c_in, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or x.shape[-2] < LONG:
            return self._transition(x)
        parts = [self._transition(part) for part in x.reshape(-1, self.c_in).chunk(PARTS)]
        return torch.cat(parts).view(x.shape)

    def _transition(self, x: Tensor) -> Tensor:
        y = self.layernorm1(x)
        return self.linear_no_bias(F.silu(self.linear_no_bias_a(y)) * self.linear_no_bias_b(y))
