"""The pair biases of the diffusion module, made once for all steps and samples of a target.

The pair representations of tokens and of atoms that they are made from follow from arguments of `sample_diffusion`
that no step changes: noise and coordinates enter elsewhere.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from flashbias.integrations.integration import say_once


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


_kept: ContextVar[KeptBiases | None] = ContextVar("flashbias_protenix_biases", default=None)


@contextmanager
def kept_biases(model: nn.Module, denoiser: Any, budget: int) -> Iterator[None]:
    """Inside, the denoiser's attentions keep their biases; not in training, nor where gradients are recorded."""
    if model.training or torch.is_grad_enabled() or not isinstance(denoiser, nn.Module) or budget == 0:
        yield
        return
    token = _kept.set(KeptBiases(denoiser, budget))
    try:
        yield
    finally:
        _kept.reset(token)


def kept_bias(attention: nn.Module, make: Callable[[], Tensor]) -> Tensor:
    """The bias of an attention, made now unless it is kept."""
    kept = None if torch.compiler.is_compiling() else _kept.get()
    return make() if kept is None else kept.get(attention, make)
