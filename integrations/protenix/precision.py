"""Attention in fp32 by products of 16-bit numbers, where the host permits products of tf32.

Protenix runs its diffusion and its confidence head in fp32 and, unless `enable_tf32` is off, lets torch round what it
multiplies to tf32. The operator never does that by itself. fp16 has as many bits as tf32 has, and is faster; what it
lacks in range is made up for by factors for each head, chosen where the numbers are: nothing waits for the GPU.
"""

import math

import torch
from torch import Tensor

from flashbias import plan
from flashbias.integrations.integration import run_while_traced

LARGEST = 2.0**15  # half of what fp16 can hold, a power of two
SMALLEST = 1e-30  # that is divided by
# The operator's scale for halves, whose products have the rest of the scale in them. Times log2(e) it is exactly 1 in
# fp32: a row's largest exponent is then exactly 0, while rounding one of 2^29 would leave up to 2^16 of it, as infinite
# a weight in fp16 as it is wrong.
SCALE = math.log(2)
ENOUGH_SCORES = 2**25  # with fewer, the conversion's launches take longer than an H200 saves by one product for six


@run_while_traced
def tf32_is_permitted() -> bool:
    """Whether torch may multiply fp32 matrices as tf32 on a GPU, whichever of its switches says so."""
    matmul = torch.backends.cuda.matmul
    # Before torch 2.9 there is no such attribute; since then the old one cannot be read when the new one was set.
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def permits_halves(x: Tensor, scores: int) -> bool:
    """Whether attention of an input x may be, and had better be, computed from halves.

    It may in fp32 where tf32 is permitted and no gradients are recorded; under autocast the host has chosen its
    precision already. It had better with many scores, batch * heads * queries * keys.
    """
    if torch.is_grad_enabled() or x.dtype != torch.float32 or x.device.type != "cuda" or scores < ENOUGH_SCORES:
        return False
    return not torch.is_autocast_enabled(x.device.type) and tf32_is_permitted()


def as_permitted(
    query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, float, Tensor | None]:
    """Queries, keys, values and their scale for the operator, and the unit of its output, None where that is 1.

    As they are, or as halves.
    """
    if permits_halves(query, query.shape[:-1].numel() * key.shape[-2]):
        return as_halves(query, key, value, scale)
    return query, key, value, scale, None


def as_halves(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, float, Tensor]:
    """Queries, keys and values `(*batch, H, N, C)` as fp16, their scale, and the unit `(*batch, H, 1, 1)` of an output.

    In every head the largest value becomes `LARGEST`, and queries and keys have the same largest entry, with the same
    scaled products as before. Where that would be beyond `LARGEST`, they are smaller than before: of such scores, 10^9
    and more, tf32 knows no more than which is the largest. Zeros stay zeros, and NaN spreads through its head.
    """
    factor = scale / SCALE
    if _has_kernels(query, key, value):
        from flashbias.kernels import halves

        query, key, value, unit = halves.as_halves(query, key, value, factor, LARGEST, SMALLEST)
        return query, key, value, SCALE, unit
    q_most, k_most, v_most = torch.stack(
        [torch.linalg.vector_norm(x, torch.inf, (-2, -1), keepdim=True) for x in (query, key, value)]
    ).clamp_(min=SMALLEST)
    both = (q_most * k_most * factor).sqrt_().clamp_(max=LARGEST)
    unit = v_most / LARGEST
    return _over(query, q_most / both), _over(key, k_most / both), _over(value, unit), SCALE, unit


def to_half(bias: Tensor) -> Tensor:
    """A bias as fp16, which has no bit less than the products of tf32 that it was made by; none becomes infinite."""
    largest = torch.finfo(torch.float16).max
    return bias.clamp(-largest, largest).half()


def in_units(out: Tensor, unit: Tensor | None) -> Tensor:
    """An output `(*batch, H, N, C)` as `(*batch, N, H, C)`; one of halves in fp32, laid out by that shape."""
    out = out.transpose(-2, -3)
    if unit is None:
        return out
    made = torch.empty(out.shape, dtype=torch.float32, device=out.device)
    return torch.mul(out, unit.transpose(-2, -3), out=made)


def _has_kernels(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether two kernels do all of it: what they are for, and not in a graph."""
    if torch.compiler.is_compiling() or plan.backend(query.device) != "triton":
        return False
    alike = len({(*x.shape[:-2], x.shape[-1], x.dtype, type(x)) for x in (query, key, value)}) == 1
    return alike and type(query) is Tensor and query.dtype == torch.float32 and min(query.numel(), key.numel()) > 0


def _over(x: Tensor, unit: Tensor) -> Tensor:
    """x over a unit, rounded once, and laid out as x is."""
    if torch.compiler.is_compiling():  # which joins the two, and takes no output that is laid out otherwise
        return (x / unit).half()
    return torch.div(x, unit, out=torch.empty_like(x, dtype=torch.float16))
