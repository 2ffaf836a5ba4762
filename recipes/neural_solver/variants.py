"""In which ways the attention of the model is computed.

Each takes the weights of the distances from the layer, has gradients for all parameters, and returns fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .model import Attend, Attention, Prepare

EXACT, ROUNDED, OURS = "exact fp32", "exact distances, fp16", "flashbias"
ROWS = 2**27  # scores that the exact computation holds at a time


class Variant(NamedTuple):
    """What layers share, what a layer does, and whether it needs a GPU."""

    prepare: Prepare
    attend: Attend
    cuda: bool = False


def variants(kernel: Callable[..., Tensor] | None = None) -> dict[str, Variant]:
    """All by name. `kernel` is the paper's `flash_bias_func`, where a checkout of it is named."""
    found = {
        EXACT: Variant(lambda points: points, exact),
        ROUNDED: Variant(lambda points: points, lambda layer, x, points: exact(layer, x, points, in_half=True)),
        "half factors": Variant(stock_factors, half_factors),
        OURS: Variant(_our_factors, flashbias),
        "flex": Variant(lambda points: points, flex, cuda=True),
        "cudnn, joined": Variant(_centred, cudnn_joined, cuda=True),
        "cudnn, no bias (wrong)": Variant(lambda points: points, cudnn_without, cuda=True),
    }
    if kernel is not None:
        found["paper"] = Variant(stock_factors, lambda layer, x, factors: paper(kernel, layer, x, factors), cuda=True)
    return found


def exact(layer: Attention, x: Tensor, points: Tensor, in_half: bool = False) -> Tensor:
    """Dense, in the dtype of x, distances by differences; some rows at a time, made anew on the way back.

    In half: query, key, value, their products, the weights and the output are numbers that fp16 can hold. The error of
    that is the measure for what computes in half precision.
    """
    query, key, value, weight = layer.projected(x)
    near = functools.partial(rounded, dtype=torch.float16) if in_half else lambda tensor: tensor

    def rows(query: Tensor, weight: Tensor, some: Tensor, key: Tensor, value: Tensor) -> Tensor:
        square = (some[:, None, :, None] - points[:, None, None]).square().sum(-1)
        scores = near(near(query) @ near(key).mT) * layer.scale - weight[..., None] * square
        return near(near(scores.softmax(-1)) @ near(value))

    count = max(1, ROWS // (query.shape[0] * layer.heads * points.shape[1]))
    parts = zip(query.split(count, 2), weight.split(count, 2), points.split(count, 1), strict=True)
    if count >= points.shape[1]:
        return layer.joined(rows(query, weight, points, key, value))
    made = [checkpoint(rows, q, w, some, key, value, use_reentrant=False) for q, w, some in parts]
    return layer.joined(torch.cat(made, 2))


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """To that dtype and back; gradients pass as they are."""
    return tensor + (tensor.detach().to(dtype).to(tensor.dtype) - tensor.detach())


def stock_factors(points: Tensor) -> tuple[Tensor, Tensor]:
    """The library's factors `(B, N, 1, d + 2)`: raw coordinates, by way of angles and back."""
    if points.shape[-1] == 2:
        x, y = points.unbind(-1)
        radius, angle = torch.sqrt(x**2 + y**2), torch.atan2(y, x)
        back = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1)
    else:
        x, y, z = points.unbind(-1)
        radius = torch.sqrt(x**2 + y**2 + z**2 + 1e-8)
        polar, angle = torch.acos(torch.clamp(z / radius, -1.0, 1.0)), torch.atan2(y, x)
        back = torch.stack((torch.sin(polar) * torch.cos(angle), torch.sin(polar) * torch.sin(angle), z / radius), -1)
        back = back * radius[..., None]
    square = -radius.square()[..., None]
    one = torch.ones_like(square)
    q_factor, k_factor = torch.cat((2 * back, square, one), -1), torch.cat((back, one, square), -1)
    return q_factor.unsqueeze(2), k_factor.unsqueeze(2)


def half_factors(layer: Attention, x: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
    """The library's arithmetic, dense: features and factors rounded to half precision, and the gradients with them."""
    query, key, value, weight = layer.projected(x)
    q_factor = (weight[..., None] * factors[0].transpose(1, 2)).half().float()
    k_factor = factors[1].transpose(1, 2).half().float()
    scores = query.half().float() @ key.half().float().mT * layer.scale + q_factor @ k_factor.mT
    out = scores.softmax(-1).half().float() @ value.half().float()
    return layer.joined(out.half().float())


def _our_factors(points: Tensor) -> Any:
    from flashbias.integrations.neural_solver import attention

    return attention.get_matrix(None, points)


def flashbias(layer: Attention, x: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
    """What the patch does."""
    from flashbias.integrations.neural_solver import attention

    return attention.attention(layer, x, *factors, precision="auto")


def paper(kernel: Callable[..., Tensor], layer: Attention, x: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
    """The paper's kernel, called as the library calls it."""
    query, key, value, weight = (tensor.transpose(1, 2) for tensor in layer.projected(x))
    q_factor = (weight[..., None] * factors[0]).half()
    k_factor = factors[1].expand(-1, -1, layer.heads, -1).contiguous().half()
    out = kernel(query.half(), key.half(), value.half(), q_factor, k_factor, None, False, layer.scale)
    return layer.joined(out.float().transpose(1, 2))


def flex(layer: Attention, x: Tensor, points: Tensor) -> Tensor:
    """FlexAttention, compiled, distances in space computed for each score in fp32."""
    query, key, value, weight = layer.projected(x)
    across, up, along = (axis.contiguous() for axis in points.unbind(-1))
    weight = weight.contiguous()

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        x, y, z = across[b, i] - across[b, j], up[b, i] - up[b, j], along[b, i] - along[b, j]
        return score - weight[b, h, i] * (x * x + y * y + z * z)

    attend = _compiled_flex()
    out = attend(query.half(), key.half(), value.half(), score_mod=score_mod, scale=layer.scale)
    return layer.joined(out.float())


def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    if not _flex:
        _flex.append(torch.compile(flex_attention, dynamic=False))
    return _flex[0]


_flex: list[Any] = []


def _centred(points: Tensor) -> Tensor:
    return points - (points.amin(1, keepdim=True) + points.amax(1, keepdim=True)) / 2


def cudnn_joined(layer: Attention, x: Tensor, points: Tensor) -> Tensor:
    """cuDNN's attention on features joined with factors, each of these as a sum of two halves."""
    query, key, value, weight = layer.projected(x)
    r, w = points[:, None], weight[..., None] / layer.scale
    square = r.square().sum(-1, keepdim=True)
    q_factor, k_factor = torch.cat((2 * w * r, -w), -1), torch.cat((r, square), -1)  # less what is constant along rows
    q_high, k_high = q_factor.half(), k_factor.half()
    q_low, k_low = (q_factor - q_high).half(), (k_factor - k_high).half()
    join = [
        (query.half(), q_high, q_high, q_low),
        (key.half(), *(_per_head(k, layer) for k in (k_high, k_low, k_high))),
    ]
    query, key = (torch.cat(parts, -1) for parts in join)
    query, key = (F.pad(tensor, (0, -tensor.shape[-1] % 8)) for tensor in (query, key))
    value = F.pad(value.half(), (0, query.shape[-1] - value.shape[-1]))
    return layer.joined(_cudnn(query, key, value, layer)[..., : layer.dim_head].float())


def cudnn_without(layer: Attention, x: Tensor, points: Tensor) -> Tensor:
    """Attention without the bias: wrong, and a bound. The weights of the distances get no gradient."""
    query, key, value, _ = layer.projected(x)
    return layer.joined(_cudnn(query.half(), key.half(), value.half(), layer).float())


def _per_head(factor: Tensor, layer: Attention) -> Tensor:
    return factor.expand(-1, layer.heads, -1, -1)


def _cudnn(query: Tensor, key: Tensor, value: Tensor, layer: Attention) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value, scale=layer.scale)


def load_kernel(repository: Path) -> Callable[..., Tensor]:
    """The paper's `flash_bias_func`, from a checkout of thuml/FlashBias or of Neural-Solver-Library.

    Raises `HostMissingError` where there is none.
    """
    import importlib.util

    from flashbias.patches import HostMissingError
    from flashbias.recipes.bench.third_party import find

    path = find(repository) or find(repository / "layers")
    spec = None if path is None else importlib.util.spec_from_file_location("flash_bias_triton", path)
    if spec is None or spec.loader is None:
        wanted = "a checkout of github.com/thuml/FlashBias or github.com/thuml/Neural-Solver-Library"
        raise HostMissingError(f"no flash_bias_triton.py in {repository}", wanted, "name its top folder")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.flash_bias_func
