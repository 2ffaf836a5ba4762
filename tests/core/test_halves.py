"""fp32 as fp16 over units of each head, in two kernels: beside the same in torch's operations."""

import pytest
import torch
from torch import Tensor

from flashbias.kernels.halves import as_halves

FACTOR, LARGEST, SMALLEST = 0.3, 2.0**15, 1e-30


def expected(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """The same formula, in float64 but for the largest magnitudes."""
    q, k, v = (x.abs().amax((-2, -1), keepdim=True).clamp(min=SMALLEST) for x in (query, key, value))
    both = (q * k * FACTOR).sqrt().clamp(max=LARGEST)
    unit = v / LARGEST
    return (
        query.double() / (q / both).double(),
        key.double() / (k / both).double(),
        value.double() / unit.double(),
        unit,
    )


def draw(device: str, n_q: int = 37, n_k: int = 150, c: int = 24, batch: tuple[int, ...] = (2,)) -> list[Tensor]:
    return [torch.randn(*batch, 3, n, c, device=device) for n in (n_q, n_k, n_k)]


def assert_halves(inputs: list[Tensor]) -> None:
    *wanted, unit = expected(*inputs)
    *made, made_unit = as_halves(*inputs, FACTOR, LARGEST, SMALLEST)
    torch.testing.assert_close(made_unit, unit, rtol=2**-22, atol=0)
    assert made_unit.shape == unit.shape
    for half, exact in zip(made, wanted, strict=True):
        assert half.dtype == torch.float16
        assert half.shape == exact.shape
        assert half.is_contiguous()
        # Rounded to 11 bits, or to a multiple of the smallest of halves; 1e-6 for units that are rounded, too.
        torch.testing.assert_close(half.double(), exact, rtol=2**-11 + 1e-6, atol=2**-25)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1e-6, 1e6, 1e6), (1e6, 1e-6, 1e-6), (1e6, 1e6, 1), (0, 1, 1), (1, 0, 0)])
def test_sizes(device: str, sizes: tuple[float, float, float]) -> None:
    assert_halves([size * x for size, x in zip(sizes, draw(device), strict=True)])


@pytest.mark.parametrize(
    ("n_q", "n_k", "c", "batch"),
    [
        (1, 1, 1, ()),
        (33, 17, 48, (5,)),
        (700, 9, 24, ()),
        (5, 600, 32, (2, 2)),
        (130, 130, 7, (1,)),
        (3, 4, 100, (40,)),
    ],
)
def test_shapes(device: str, n_q: int, n_k: int, c: int, batch: tuple[int, ...]) -> None:
    assert_halves(draw(device, n_q, n_k, c, batch))


@pytest.mark.parametrize("place", [0, 1, 36])
def test_the_largest_is_found_wherever_it_is(device: str, place: int) -> None:
    inputs = draw(device)
    for x in inputs:
        x[1, 2, place, place % 24] = -300.0
    assert_halves(inputs)
    half = as_halves(*inputs, FACTOR, LARGEST, SMALLEST)[2]
    assert half[1, 2, place, place % 24] == -LARGEST


@pytest.mark.parametrize(
    "view", ["projected", "one product", "expanded", "every other row", "every other column", "turned"]
)
def test_any_strides(device: str, view: str) -> None:
    n, h, c = 37, 3, 24
    change = {
        "projected": lambda x: x.transpose(-2, -3).contiguous().transpose(-2, -3),
        "one product": lambda x: torch.cat([x.transpose(-2, -3).flatten(-2)] * 4, -1)
        .chunk(4, -1)[1].unflatten(-1, (h, c)).transpose(-2, -3),
        "expanded": lambda x: x[:1].expand(4, -1, -1, -1),
        "every other row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
        "every other column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
        "turned": lambda x: x.mT.contiguous().mT,
    }[view]  # fmt: skip
    assert_halves([change(x) for x in draw(device, n, n, c)])


@pytest.mark.parametrize("strange", [torch.nan, -torch.nan, torch.inf])
@pytest.mark.parametrize("tensor", [0, 1, 2])
def test_a_strange_number_spoils_its_head_only(device: str, strange: float, tensor: int) -> None:
    plain = draw(device)
    spoilt = [x.clone() for x in plain]
    spoilt[tensor][0, 1, 3, 2] = strange
    wanted, made = as_halves(*plain, FACTOR, LARGEST, SMALLEST), as_halves(*spoilt, FACTOR, LARGEST, SMALLEST)
    others = torch.ones(2, 3, dtype=torch.bool)
    others[0, 1] = False
    for a, b in zip(made, wanted, strict=True):
        torch.testing.assert_close(a[others], b[others], rtol=0, atol=0)
    assert made[tensor][0, 1].isnan().any()
    if strange != torch.inf:
        assert made[tensor][0, 1].isnan().all()
        assert made[1 - tensor if tensor < 2 else 3][0, 1].isnan().all()
