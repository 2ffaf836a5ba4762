"""The kernel for gates, beside torch's operations."""

import pytest
import torch
from torch import Tensor

from flashbias.kernels.gate import gated

# Rounded once; through the interpreter, bf16 is cut off where a GPU rounds.
DTYPES = {torch.float32: 2**-21, torch.float16: 2**-11 + 2**-20, torch.bfloat16: 2**-7}


def expected(gate: Tensor, out: Tensor, unit: Tensor | None) -> Tensor:
    out = out.double() if unit is None else out.double() * unit.double()
    return (gate.double().sigmoid() * out).transpose(-2, -3).flatten(-2)


def assert_gated(gate: Tensor, out: Tensor, unit: Tensor | None = None) -> None:
    made, wanted = gated(gate, out, unit), expected(gate, out, unit)
    assert made.dtype == gate.dtype
    assert made.shape == wanted.shape
    assert made.is_contiguous()
    torch.testing.assert_close(made.double(), wanted, rtol=DTYPES[gate.dtype], atol=2**-25)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "n", "c"),
    [((5,), 4, 37, 32), ((), 1, 1, 1), ((2, 3), 3, 20, 8), ((2,), 2, 300, 24), ((3,), 16, 5, 48), ((0,), 2, 3, 4)],
)
def test_shapes(device: str, batch: tuple[int, ...], heads: int, n: int, c: int, dtype: torch.dtype) -> None:
    gate, out = torch.randn(2, *batch, heads, n, c, device=device).unbind()
    assert_gated(4 * gate.to(dtype), out.to(dtype))


def test_units_of_heads(device: str) -> None:
    gate, out = torch.randn(2, 6, 5, 33, 8, device=device).unbind()
    assert_gated(gate, 1000 * out.half(), torch.rand(6, 5, 1, 1, device=device) * 1e-3)


@pytest.mark.parametrize("of", ["gate", "out"])
def test_any_strides(device: str, of: str) -> None:
    gate, out = torch.randn(2, 6, 5, 33, 8, device=device).unbind()
    if of == "gate":  # one of four that one product makes
        gate = torch.randn(6, 33, 4, 5, 8, device=device).transpose(1, 3)[:, :, 3]
    else:
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
    assert_gated(gate, out)


def test_extremes(device: str) -> None:
    gate = torch.tensor([-1e30, -200.0, 0.0, 200.0, torch.inf, -torch.inf, torch.nan, 1.0], device=device).view(
        1, 1, 1, 8
    )
    made = gated(gate, torch.full((1, 1, 1, 8), 2.0, device=device), None).flatten()
    torch.testing.assert_close(made[:6].cpu(), torch.tensor([0.0, 0, 1, 2, 2, 0]))
    assert made[6].isnan()
