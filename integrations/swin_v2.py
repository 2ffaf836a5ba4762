"""SwinV2 of timm and of Microsoft: window attention that holds neither the scores nor a mask in memory.

Importing this module patches `timm.models.swin_transformer_v2`, and the module `models.swin_transformer_v2` of
Microsoft's Swin-Transformer, each at once or when it is imported; `revert()` undoes it. Weights and state dicts stay
what they are, in inference and in training.

The bias of SwinV2 is a matrix `(H, N, N)` that a small network makes from relative positions, the same for every
window. In inference it is made once and kept until the weights change, as `configure` says: the exact matrix, or thin
factors where they are as good and faster; `choices(model)` tells what each layer got and why. In training, wherever
its gradients are recorded, in exported graphs and in CUDA graphs the exact matrix is made in every call, so that
gradients and new weights reach it. Under autocast it is made in fp32, closer to the model in fp32 than the host's own.

A shifted window's mask says which positions belong to the same part of the image. The hosts add -100 between others;
here they do not attend to each other at all. (Scores of cosine attention are bounded by `exp(logit_scale) + 16`, so
the hosts' way gives a weight of about `exp(2 * exp(logit_scale) - 84)` at most: nothing, unless the scale is above 30.)
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashbias import Bias, DenseBias, Segments, biased_attention
from flashbias.patches import Patch, PatchSet, attributes_read

from .choice import Choice, Settings, choose
from .derived import Derived, keepable
from .integration import Integration, Replacement, is_hooked, not_computable, say_once
from .segments import is_partition, segment_ids

_biases: Derived[tuple[Bias, Choice]] = Derived()


# Optional, because TorchScript reads this signature.
def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
    """`WindowAttention.forward`: x `(images * windows, N, C)`, mask `(windows, N, N)`, 0 or -100, or None."""
    if torch.jit.is_scripting():
        return self.forward_before_flashbias(x, mask)
    else:
        return _replacement(self, x, mask)


def train(self: Any, mode: bool = True) -> Any:
    """`WindowAttention.train`, also what `eval` calls: a good moment to make the bias anew."""
    forget(self)
    return self.train_before_flashbias(mode)


def forget(module: nn.Module) -> None:
    """Make the biases of a model, or of one attention, anew at the next call.

    Needed only after weights were written through `.data` or numpy, or by a fused optimizer whose step is compiled,
    which torch does not count as changes; and not when `train` or `eval` is called anyway.
    """
    for part in module.modules():
        if isinstance(scale := getattr(part, "logit_scale", None), Tensor):
            _biases.forget(scale)


def choices(model: nn.Module) -> list[Choice]:
    """In which form the bias of each layer is kept, why, and the errors of the factors that were tried."""
    found = []
    for name, part in model.named_modules():
        if not isinstance(getattr(part, "logit_scale", None), Tensor) or not hasattr(part, "cpb_mlp"):
            continue
        made_from = _made_from(part)
        kept = None if made_from is None else _biases.kept(part.logit_scale, made_from)
        if kept is not None:
            found.append(replace(kept[1], layer=name))
        elif part.training or made_from is None:
            reason = "in training" if part.training else "a cpb_mlp of another make, or with hooks"
            found.append(Choice(name, "exact", f"{reason}: made in every call"))
        else:
            found.append(Choice(name, "undecided", "not called without gradients since its weights changed"))
    return found


def dense_bias(attention: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """The exact bias of an attention, `(H, N, N)`, made now."""
    with _without_autocast(attention.relative_coords_table.device.type):
        hidden = attention.cpb_mlp(attention.relative_coords_table)
    return _gather_bias(hidden, attention.relative_position_index, dtype)


def window_attention(attention: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Window attention of the module, like `WindowAttention.forward`."""
    windows, n, channels = x.shape
    query, key, value = (
        _project(attention, x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    )
    # Under autocast normalisation is fp32; v has the dtype in which the products are taken.
    query = (F.normalize(query, dim=-1) * _scale(attention.logit_scale)).to(value.dtype)
    key = F.normalize(key, dim=-1).to(value.dtype)
    made_from = _made_from(attention)
    if made_from is None or _is_live(attention):
        out = _attend(query, key, value, DenseBias(_live_bias(attention, value.dtype)), mask)
    elif torch.compiler.is_compiling():
        out = torch.ops.flashbias.swin_v2_attention(query, key, value, mask, made_from)
    else:
        out = _attend(query, key, value, _kept_bias(made_from, query), mask)
    out = out.transpose(-3, -2).reshape(windows, n, channels)
    return attention.proj_drop(attention.proj(out))


def _project(attention: Any, x: Tensor) -> Tensor:
    """Queries, keys and values side by side, `(images * windows, N, 3 * C)`; the key has no bias to learn."""
    if attention.q_bias is None:
        return attention.qkv(x)
    k_bias = attention.k_bias if hasattr(attention, "k_bias") else torch.zeros_like(attention.v_bias)
    bias = torch.cat((attention.q_bias, k_bias, attention.v_bias))
    if getattr(attention, "qkv_bias_separate", False):
        return attention.qkv(x) + bias
    return F.linear(x, attention.qkv.weight, bias)


def _is_live(attention: Any) -> bool:
    """Whether the bias has to be made in this call: its gradients are recorded, or the graph will run elsewhere."""
    in_graph = torch.compiler.is_compiling() and torch.is_grad_enabled()
    # What `torch.compiler.is_exporting()` returns, but for graphs of torch.compile in torch 2.11, where that says True.
    # (Torch 2.7 sets it in a strict export too late: without gradients, that graph gets what a compiled one does.)
    return in_graph or _is_recorded(attention) or torch.compiler._is_exporting_flag


def _is_recorded(attention: Any) -> bool:
    weights = attention.cpb_mlp.parameters()
    return attention.training or (torch.is_grad_enabled() and any(weight.requires_grad for weight in weights))


def _live_bias(attention: Any, dtype: torch.dtype) -> Tensor:
    if INTEGRATION.settings.mode == "factored":
        say_once("swin_v2: factors are kept for inference; elsewhere the exact bias is made in every call")
    # fp32 where it is differentiated: a gradient would be rounded by the cast.
    return dense_bias(attention, torch.float32 if _is_recorded(attention) else _kept_dtype(dtype))


def _made_from(attention: Any) -> list[Tensor] | None:
    """What `_kept_bias` needs; None if the small network is not as in the hosts, or its weights are not kept."""
    network = attention.cpb_mlp
    if type(network) is not nn.Sequential or [type(part) for part in network] != [nn.Linear, nn.ReLU, nn.Linear]:
        return None
    if is_hooked(network) or any(is_hooked(part) for part in network):
        return None
    first, _, last = network
    weights = [first.weight, first.bias, last.weight]
    if last.bias is not None or not all(isinstance(weight, nn.Parameter) for weight in weights):
        return None
    return [*weights, attention.relative_coords_table, attention.relative_position_index, attention.logit_scale]


def _kept_bias(made_from: Sequence[Tensor], query: Tensor, keep: bool = True) -> Bias:
    """The bias in the form that was chosen for it; without `keep`, or where nothing can be kept, the exact one."""
    weight, bias, last_weight, coords, index, logit_scale = made_from

    def make(dtype: torch.dtype) -> Tensor:
        with _without_autocast(coords.device.type):
            hidden = F.linear(F.relu(F.linear(coords, weight, bias)), last_weight)
        return _gather_bias(hidden, index, dtype)

    def choice() -> tuple[Bias, Choice]:
        scale = _scale(logit_scale).flatten()
        return choose(make, dtype, scale, query.shape[-1], INTEGRATION.settings)

    dtype = _kept_dtype(query.dtype)
    if not keep or not keepable(made_from):
        return DenseBias(make(dtype))
    return _biases.get(logit_scale, made_from, (dtype, INTEGRATION.settings), choice)[0]


def _kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp16 holds numbers up to 16 better than bf16 does."""
    return torch.float32 if dtype == torch.float32 else torch.float16


def _gather_bias(hidden: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias from what the small network gives for each relative position, `(..., H)`."""
    # Rows start at multiples of 16 bytes, as wide loads want them: for a window of 7 x 7, 49 of 56 columns are used.
    n = index.shape[-1]
    per_offset = 16 * torch.sigmoid(hidden.flatten(0, -2).float())
    table = per_offset[F.pad(index, (0, -n % 8))].permute(2, 0, 1)
    return table.to(dtype, memory_format=torch.contiguous_format)[..., :n]


def _without_autocast(device: str) -> contextlib.AbstractContextManager:
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _scale(logit_scale: Tensor) -> Tensor:
    return torch.clamp(logit_scale, max=math.log(100)).exp()


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Bias, mask: Tensor | None, keep: bool = True) -> Tensor:
    """Attention of `(images * windows, H, N, C)`, scores not scaled further."""
    if mask is None:
        out = biased_attention(query, key, value, bias, scale=1.0)
        assert isinstance(out, Tensor)
        return out
    shape = (query.shape[0] // mask.shape[0], mask.shape[0])
    query, key, value = (tensor.unflatten(0, shape) for tensor in (query, key, value))
    ids = segment_ids(mask, keep)
    out = biased_attention(query, key, value, bias, mask=Segments(ids, ids), scale=1.0)
    assert isinstance(out, Tensor)
    return out.flatten(0, 1)


# In a compiled graph, attention with a kept bias is one operator, which looks at the weights whenever it runs.
_LIBRARY = torch.library.Library("flashbias", "FRAGMENT")
_LIBRARY.define(
    "swin_v2_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor[] made_from) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(_LIBRARY, "swin_v2_attention", "CompositeExplicitAutograd")
def _attend_in_graph(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, made_from: list[Tensor]) -> Tensor:
    # CUDA graphs are warmed up and captured on streams of their own, with memory that they use again.
    keep = not query.is_cuda or torch.cuda.current_stream(query.device) == torch.cuda.default_stream(query.device)
    return _attend(query, key, value, _kept_bias(made_from, query, keep), mask, keep)


@torch.library.register_fake("flashbias::swin_v2_attention", lib=_LIBRARY)
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, made_from: list[Tensor]) -> Tensor:
    out = biased_attention(query, key, value)  # lies in memory as that of the true bias does
    assert isinstance(out, Tensor)
    return out


def _not_covered(attention: Any, x: Tensor, mask: Tensor | None = None) -> str | None:
    if reason := not_computable(x):
        return reason
    if attention.training and getattr(attention.attn_drop, "p", 0) > 0:
        return "attention dropout in training"
    if is_hooked(attention.softmax) or is_hooked(attention.attn_drop):
        return "a hook on the attention weights, which are never made,"
    if type(attention.softmax) is not nn.Softmax or type(attention.attn_drop) not in (nn.Dropout, nn.Identity):
        return "a softmax or dropout of another make"
    if mask is not None and not is_partition(mask):
        return "a mask that is not one of a shifted window"
    return None


# What the window attention of Microsoft's code consists of.
_PARTS = (
    "q_bias v_bias qkv num_heads logit_scale cpb_mlp relative_coords_table relative_position_index window_size softmax "
    "attn_drop proj proj_drop"
)


def _is_microsofts(source: str) -> bool:
    return attributes_read(source, "WindowAttention.forward") == set(_PARTS.split())


_KEPT = "forward_before_flashbias"
_replacement = Replacement("swin_v2", window_attention, _not_covered, original=_KEPT)


def _patches(module: str) -> tuple[Patch, Patch]:
    return (
        Patch(f"{module}:WindowAttention.forward", forward, ("self", "x", "mask"), keep_as=_KEPT),
        Patch(f"{module}:WindowAttention.train", train, ("self", "mode"), keep_as="train_before_flashbias"),
    )


INTEGRATION = Integration(
    "swin_v2",
    PatchSet(*_patches("timm.models.swin_transformer_v2"), distribution="timm", versions=">=1.0,<2"),
    PatchSet(*_patches("models.swin_transformer_v2"), host="microsoft/Swin-Transformer", recognise=_is_microsofts),
    settings=Settings(),
)
apply, revert, is_applied = INTEGRATION.apply, INTEGRATION.revert, INTEGRATION.is_applied


def configure(*, mode: str = "auto", rank: int = 16, tolerance: float = 1e-3) -> None:
    """Choose how the bias is kept for inference: "exact", "auto" or "factored"; see `choice.Settings`.

    Raises `ConfigurationError` for a mode, rank or tolerance that does not exist.
    """
    INTEGRATION.configure(Settings(mode, rank, tolerance))


INTEGRATION.apply_when_imported()
