"""The kernel for layer norms, beside torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashbias.kernels import norm

# Through the interpreter, bf16 is cut off where a GPU rounds: a unit in the last place and not half of one.
DTYPES = {torch.float32: 2**-21, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def assert_like_torch(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> None:
    rounded = [None if w is None else w.to(x.dtype).double() for w in (weight, bias)]
    wanted = F.layer_norm(x.double(), x.shape[-1:], *rounded, eps)
    made = norm.layer_norm(x, weight, bias, eps)
    assert made.dtype == x.dtype
    assert made.is_contiguous()
    tolerance = DTYPES[x.dtype]
    largest = wanted.abs().max().item() if wanted.numel() else 0.0
    torch.testing.assert_close(made.double(), wanted, rtol=tolerance, atol=tolerance * largest / 8)


def draw(shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = torch.randn(2, shape[-1], device=device).unbind()
    if dtype == torch.bfloat16:  # the interpreter does not round weights either
        weight, bias = weight.to(dtype).float(), bias.to(dtype).float()
    return (3 * torch.randn(shape, device=device) + 1).to(dtype), weight, bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 7, 128), (3, 24), (17, 17, 64), (2, 3, 4, 100), (9, 512), (4, 0, 8)], ids=str
)
def test_shapes(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_like_torch(*draw(shape, device, dtype))


@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_weight_and_bias_are_optional(device: str, has_weight: bool, has_bias: bool) -> None:
    x, weight, bias = draw((6, 40), device)
    assert_like_torch(x, weight if has_weight else None, bias if has_bias else None, 1e-3)


@pytest.mark.parametrize(
    "view", ["turned", "rows of every other", "a part of the channels", "channels in front", "batch"]
)
def test_any_strides(device: str, view: str) -> None:
    x, weight, bias = draw((6, 10, 8, 16), device)
    x = {
        "turned": x[0].transpose(0, 1),
        "rows of every other": x[0, ::2],
        "a part of the channels": torch.cat([x, x], -1)[..., 16:],
        "channels in front": x.movedim(-1, 0).contiguous().movedim(0, -1),
        "batch": x.transpose(1, 2),
    }[view]
    assert_like_torch(x, weight, bias)


def test_more_rows_than_a_grid_has(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "MAX_BATCH", 3)
    x, weight, bias = draw((5, 4, 16), device)
    assert_like_torch(x.transpose(0, 1), weight, bias)


def test_a_mean_far_from_zero(device: str) -> None:
    """Two passes: no difference of large squares."""
    x, weight, bias = draw((50, 128), device)
    x = x + 1000
    exact = F.layer_norm(x.double(), (128,), weight.double(), bias.double())
    assert (norm.layer_norm(x, weight, bias, 1e-5) - exact).abs().max() < 1e-3


def test_nan_stays_in_its_row(device: str) -> None:
    x, weight, bias = draw((40, 16), device)
    wanted = norm.layer_norm(x, weight, bias, 1e-5)
    x[7, 3] = torch.nan
    made = norm.layer_norm(x, weight, bias, 1e-5)
    assert made[7].isnan().all()
    others = torch.arange(40) != 7
    torch.testing.assert_close(made[others], wanted[others], rtol=0, atol=0)
