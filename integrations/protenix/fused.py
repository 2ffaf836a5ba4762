"""What surrounds triangle attention in its module, in fewer and faster kernels, where nobody can see the difference.

In inference on a GPU, and where the host's layers are its own and nobody has hooked, replaced, quantised or adapted
them: what is not so is computed by the host's layers, part by part.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashbias import plan
from flashbias.integrations.integration import is_hooked

_LAYERS = "protenix.model.triangular.layers"
_DTYPES = (torch.float32, torch.bfloat16)


class Parts(NamedTuple):
    """What the host's layers do not compute in a call of a module, in all its chunks alike.

    bias, joint, out: weights of the bias' projection, of the four of queries, keys, values and gates one below the
    other, `(4 H C, c)`, and of the output's, in bf16 beside such an input; None where the host's layers project.
    gate: whether the kernel gates. All weights are read anew in every call, which takes less time than to find out
    whether what was made of them is still right.
    """

    bias: Tensor | None = None
    joint: Tensor | None = None
    gate: bool = False
    out: Tensor | None = None


def is_possible(x: Tensor) -> bool:
    """Whether any of that may be: no gradients, no graph, the operator's kernels, and a dtype that they have."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) is not Tensor or x.dtype not in _DTYPES:
        return False
    return plan.backend(x.device) == "triton"


def parts(module: Any, x: Tensor) -> Parts:
    """What is not left to the layers of a module with the normalised input x."""
    if not is_possible(x):
        return Parts()
    mha = module.mha
    layers = (mha.linear_q, mha.linear_k, mha.linear_v, mha.linear_g)
    four = [weight for layer in layers if (weight := _weight(layer)) is not None]
    joint = torch.cat(four) if len(four) == 4 and len({weight.dtype for weight in four}) == 1 else None
    bias, out, sigmoid = _weight(module.linear), _weight(mha.linear_o), mha.sigmoid
    if x.dtype == torch.bfloat16:
        bias, joint, out = (weight if weight is None else weight.to(x.dtype) for weight in (bias, joint, out))
    elif _casts(x):
        out = None  # what comes out of attention has another dtype than x
    return Parts(bias, joint, type(sigmoid) is nn.Sigmoid and not is_hooked(sigmoid), out)


def normalised(norm: Any, x: Tensor) -> Tensor:
    """The layer norm of x, `(..., c)`; by the kernel in the place of the host's one in torch, not of its own kernel."""
    if is_possible(x) and _is_own(norm, "OpenFoldLayerNorm") and norm.c_in == x.shape[-1:]:
        from flashbias.kernels.norm import MAX_CHANNELS, layer_norm

        weight, bias = norm.weight, norm.bias
        # Of other dtypes, or on other devices, torch refuses weights.
        dtypes = x.dtype, torch.float32
        known = all(w is None or (_is_plain(w) and w.dtype in dtypes and w.device == x.device) for w in (weight, bias))
        if known and x.shape[-1] <= MAX_CHANNELS:
            return layer_norm(x, weight, bias, norm.eps)
    out: Tensor = norm(x)
    return out


def projected(layer: Any, x: Tensor, weight: Tensor | None) -> Tensor:
    """What a projection makes of x: the layer, or its weight in the layer's place."""
    made: Tensor = layer(x) if weight is None else _product(x, weight)
    return made


def joined(mha: Any, x: Tensor, joint: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys, values and gates before the sigmoid, `(*batch, H, N, C)`, views of one product; of several, and
    no gates, which are still to be made, without the weights of that one."""
    if joint is None:
        return *mha._prep_qkv(x, x, apply_scale=False), None
    made = _product(x, joint).unflatten(-1, (4, mha.no_heads, -1))
    query, key, value, gate = made.transpose(-4, -2).unbind(-3)
    return query, key, value, gate


def placed(layer: Any, x: Tensor, weight: Tensor | None, place: Tensor | None) -> Tensor:
    """The projection of x, which has the dtype of the weight if there is one; in `place` where that is given."""
    if weight is not None and x.dtype != weight.dtype:
        weight = None
    if place is None:
        return projected(layer, x, weight)
    if weight is None or place.dtype != x.dtype or not (x.is_contiguous() and place.is_contiguous()):
        return place.copy_(projected(layer, x, weight))
    torch.mm(x.flatten(0, -2), weight.t(), out=place.view(-1, place.shape[-1]))
    return place


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """As the host's projections have it: bf16 stays what it is, whatever autocast says."""
    if x.dtype != torch.bfloat16 or not _casts(x):
        return F.linear(x, weight)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight)


def _casts(x: Tensor) -> bool:
    """Whether autocast would give products of x another dtype."""
    device = x.device.type
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != x.dtype


def _weight(layer: Any) -> Tensor | None:
    """The weight of a projection that multiplies by it and does nothing else, or None."""
    if not _is_own(layer, "OpenfoldLinear") or layer.bias is not None or getattr(layer, "precision", None) is not None:
        return None
    weight = layer.weight
    return weight if _is_plain(weight) and weight.dtype in _DTYPES else None


def _is_own(module: Any, name: str) -> bool:
    """Whether a module is of that very class of the host, unchanged, and nobody looks at what it does."""
    cls = type(module)
    return (
        cls.__name__ == name and cls.__module__ == _LAYERS and not is_hooked(module) and "forward" not in vars(module)
    )


def _is_plain(weight: Any) -> bool:
    """Whether a weight is just numbers."""
    return type(weight) in (nn.Parameter, Tensor) and weight.is_contiguous()
