"""Attention in fp32 by products of 16-bit numbers, where the host permits products of tf32.

Protenix runs its diffusion and its confidence head in fp32 and, unless `enable_tf32` is off, lets torch round what it
multiplies to tf32. The operator never does that by itself. fp16 has as many bits as tf32 has, and is faster; what it
lacks in range is made up for by factors for each head, chosen where the numbers are: nothing waits for the GPU.
"""

import torch
from torch import Tensor

from flashbias import plan
from flashbias.integrations.integration import run_while_traced

LARGEST = 2.0**15  # half of what fp16 can hold, a power of two
SMALLEST = 1e-30  # that is divided by
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


def as_permitted(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys and values for the operator, and the unit of its output; as they are, in no unit, or as halves."""
    scores = query.shape[:-1].numel() * key.shape[-2]
    return as_halves(query, key, value) if permits_halves(query, scores) else (query, key, value, None)


def as_halves(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values `(*batch, H, N, C)` as fp16, and the unit `(*batch, H, 1, 1)` of an output from them.

    In every head the largest value becomes `LARGEST`, and queries and keys have the same largest entry, with the same
    products as before. Where that would be beyond `LARGEST`, products are smaller than before: of such scores, 10^9
    and more, tf32 knows no more than which is the largest. Zeros stay zeros, and NaN spreads through its head.
    """
    if _has_kernels(query, key, value):
        from flashbias.kernels import halves

        return halves.as_halves(query, key, value, LARGEST, SMALLEST)
    q_most, k_most, v_most = torch.stack(
        [torch.linalg.vector_norm(x, torch.inf, (-2, -1), keepdim=True) for x in (query, key, value)]
    ).clamp_(min=SMALLEST)
    both = (q_most * k_most).sqrt_().clamp_(max=LARGEST)
    unit = v_most / LARGEST
    return _over(query, q_most / both), _over(key, k_most / both), _over(value, unit), unit


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
