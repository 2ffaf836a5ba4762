"""What surrounds triangle attention in its module, in fewer and faster kernels, where nobody can see the difference.

In inference on a GPU, and where the host's layers are its own and nobody has hooked, replaced, quantised or adapted
them. Each question `may_...` below decides about one part; a part that may not is computed by the host's layers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashbias import plan
from flashbias.integrations.integration import is_hooked

_LAYERS = "protenix.model.triangular.layers"
_DTYPES = (torch.float32, torch.bfloat16)


def may_normalise(norm: nn.Module, x: Tensor) -> bool:
    """Whether the kernel computes a layer norm: the host's one in torch. Its own kernel is what it is."""
    from flashbias.kernels.norm import MAX_CHANNELS

    if not _is_own(norm, "OpenFoldLayerNorm") or norm.c_in != x.shape[-1:] or x.shape[-1] > MAX_CHANNELS:
        return False
    # torch refuses other combinations.
    weights = (norm.weight, norm.bias)
    return all(w is None or (_is_plain(w) and w.dtype in (x.dtype, torch.float32)) for w in weights)


def may_join(mha: Any) -> bool:
    """Whether one product makes queries, keys, values and gates: none of the projections is anything but a matrix."""
    layers = [mha.linear_q, mha.linear_k, mha.linear_v, mha.linear_g]
    return all(map(_is_projection, layers)) and len({layer.weight.dtype for layer in layers}) == 1


def may_gate(mha: Any) -> bool:
    """Whether one kernel gates the output."""
    return type(mha.sigmoid) is nn.Sigmoid and not is_hooked(mha.sigmoid)


def may_place(mha: Any) -> bool:
    """Whether the last product of a chunk is written where it belongs."""
    return _is_projection(mha.linear_o)


def is_possible(x: Tensor) -> bool:
    """Whether any of that may be: no gradients, no graph, the operator's kernels, and a dtype that they have."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) is not Tensor or x.dtype not in _DTYPES:
        return False
    return plan.backend(x.device) == "triton"


def normalised(norm: Any, x: Tensor) -> Tensor:
    """The layer norm of x, `(..., c)`."""
    if not (is_possible(x) and may_normalise(norm, x)):
        out: Tensor = norm(x)
        return out
    from flashbias.kernels.norm import layer_norm

    return layer_norm(x, norm.weight, norm.bias, norm.eps)


def joint_weight(mha: Any, x: Tensor) -> Tensor | None:
    """The weights of the four projections one below the other, `(4 H C, c)`, in bf16 beside such an x; or None.

    Made in every call, which costs less than to find out whether it is still right.
    """
    if not (is_possible(x) and may_join(mha)):
        return None
    layers = (mha.linear_q, mha.linear_k, mha.linear_v, mha.linear_g)
    weight = torch.cat([layer.weight.detach() for layer in layers])
    return weight.to(x.dtype) if x.dtype == torch.bfloat16 else weight


def projected(mha: Any, x: Tensor, joint: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys and values, views `(*batch, N, H, C)` turned to `(*batch, H, N, C)`, and gates `(*batch, N, H C)`
    before the sigmoid, or None where they are still to be made."""
    if joint is None:
        return *mha._prep_qkv(x, x, apply_scale=False), None
    query, key, value, gate = _product(x, joint).chunk(4, -1)
    heads = (part.unflatten(-1, (mha.no_heads, -1)).transpose(-2, -3) for part in (query, key, value))
    return *heads, gate


def gates(mha: Any, gate: Tensor, out: Tensor, unit: Tensor | None) -> bool:
    """Whether the kernel takes this gate and this output of the operator: both have one dtype, with its unit."""
    dtype = out.dtype if unit is None else unit.dtype
    return dtype == gate.dtype and is_possible(gate) and may_gate(mha)


def placed(mha: Any, out: Tensor, place: Tensor | None) -> Tensor:
    """The output's projection of `(*batch, N, H C)`; written to `place` where that is given."""
    if place is None:
        made: Tensor = mha.linear_o(out)
        return made
    # Under autocast a product of fp32 is of another dtype than its place.
    cast = torch.is_autocast_enabled(out.device.type) and out.dtype != torch.bfloat16
    alike = out.dtype == place.dtype and not cast and out.is_contiguous() and place.is_contiguous()
    if not (alike and is_possible(out) and may_place(mha)):
        return place.copy_(mha.linear_o(out))
    weight = mha.linear_o.weight.detach().to(out.dtype)
    torch.mm(out.flatten(0, -2), weight.t(), out=place.view(-1, place.shape[-1]))
    return place


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """As the host's projections have it: bf16 stays what it is, whatever autocast says."""
    if x.dtype != torch.bfloat16:
        return F.linear(x, weight)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight)


def _is_projection(layer: Any) -> bool:
    """Whether a layer multiplies by its weight and does nothing else."""
    if not _is_own(layer, "OpenfoldLinear") or layer.bias is not None or getattr(layer, "precision", None) is not None:
        return False
    return _is_plain(layer.weight) and layer.weight.dtype in _DTYPES


def _is_own(module: Any, name: str) -> bool:
    """Whether a module is of that very class of the host, unchanged, and nobody looks at what it does."""
    cls = type(module)
    return (
        cls.__name__ == name and cls.__module__ == _LAYERS and not is_hooked(module) and "forward" not in vars(module)
    )


def _is_plain(weight: Any) -> bool:
    """Whether a weight is just numbers."""
    return type(weight) in (nn.Parameter, Tensor) and weight.is_contiguous()
