"""The pair biases of the diffusion module, made once for all steps and samples of a target.

The pair representations of tokens and of atoms that they are made from follow from arguments of `sample_diffusion`
that no step changes: noise and coordinates enter elsewhere. What the host does in every step with the pair
representation of tokens, only for those biases, is left out once all of them are kept.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flashbias.integrations import verify
from flashbias.integrations.integration import is_hooked, say_once


class KeptBiases:
    """A bias for each attention of the denoiser, as far as `budget` bytes go."""

    def __init__(self, denoiser: nn.Module, budget: int) -> None:
        self._members, self._budget = set(denoiser.modules()), budget
        self._biases: dict[nn.Module, Tensor] = {}

    def get(self, attention: nn.Module, make: Callable[[], Tensor]) -> Tensor:
        """The attention's bias; `make()` computes it, in every call where it is not kept."""
        if attention not in self._members:
            return make()
        bias = self._biases.get(attention)
        if bias is None:
            # Weights are constants here: where guidance differentiates a step, it is with respect to coordinates.
            with torch.no_grad():
                bias = make()
            size = bias.untyped_storage().nbytes()
            if size <= self._budget:
                self._budget -= size
                self._biases[attention] = bias
            else:
                say_once("protenix: bias_cache_gb is too small for the biases of all blocks, the others are not kept")
        return bias

    def serve(self, attentions: list[Any]) -> bool:
        """Whether none of them will look at the pair representation that it is given."""
        return bool(attentions) and all(
            attention in self._biases and not is_hooked(attention.attention) and not verify.wanted(attention)
            for attention in attentions
        )


_kept: ContextVar[KeptBiases | None] = ContextVar("flashbias_protenix_biases", default=None)


@contextmanager
def kept_biases(model: nn.Module, denoiser: Any, budget: int) -> Iterator[None]:
    """Inside, the denoiser's attentions keep their biases; not in training, nor where gradients are recorded."""
    if model.training or torch.is_grad_enabled() or not isinstance(denoiser, nn.Module) or budget == 0:
        yield
        return
    kept = KeptBiases(denoiser, budget)
    token, handle = _kept.set(kept), _spare_pairs(kept, denoiser)
    try:
        yield
    finally:
        _kept.reset(token)
        if handle is not None:
            handle.remove()


def _spare_pairs(kept: KeptBiases, denoiser: nn.Module) -> RemovableHandle | None:
    """Have the denoiser normalise, and turn around, one pair in the place of all while no token attention reads them.

    At 1,218 tokens all are 0.8 GB, and nothing but those attentions gets what `DiffusionModule.normalize` returns.
    """
    normalize, transformer = (getattr(denoiser, name, None) for name in ("normalize", "diffusion_transformer"))
    if not isinstance(normalize, nn.Module) or not isinstance(transformer, nn.Module):
        return None
    attentions: list[Any] = [module for module in transformer.modules() if hasattr(module, "linear_nobias_z")]

    def one_pair(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        if torch.compiler.is_compiling() or not kept.serve(attentions):
            return None
        return (args[0][..., :1, :1, :],)

    return normalize.register_forward_pre_hook(one_pair)


def kept_bias(attention: nn.Module, make: Callable[[], Tensor]) -> Tensor:
    """The bias of an attention, made now unless it is kept."""
    kept = None if torch.compiler.is_compiling() else _kept.get()
    return make() if kept is None else kept.get(attention, make)
