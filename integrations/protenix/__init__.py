"""Protenix (AlphaFold 3): attention that reads its pair bias in place, and a diffusion bias that is made once.

Importing this module patches Protenix, at once or when its model (`protenix.model.protenix`) is imported; `revert()`
undoes it. Weights and state dicts stay what they are.

- Triangle attention, wherever it is (trunk, MSA, templates, confidence head; starting and ending; masks; chunks of
  rows; bf16 and fp32; inference and training), is exact: all rows read one bias `(H, N, N)`, which is never expanded.
  It takes the place of whatever kernel `triangle_attention=` names, installed or not. In inference on a GPU the layer
  norm and the gate around it come from kernels too, and queries, keys, values and gates from one product, where the
  host's layers are as it made them.
- Pair-biased attention between tokens (Pairformer, confidence head, diffusion transformer) is exact too.
- Local attention between atoms is exact; neither windows are copied nor a matrix over all atoms made.
- The biases of a diffusion step do not change from step to step: within a call of `Protenix.sample_diffusion` each
  block makes its own once, and it is freed at the end. `configure(bias_cache_gb=...)` limits the memory for that.
- In inference, transitions of very many pairs are taken in parts, as the host does it from 3,200 tokens on: else those
  of the confidence head are the peak of memory.

The diffusion and the confidence head are in fp32. Where Protenix permits products of tf32 there (`enable_tf32`, on by
default), inference computes attention between tokens, and triangle attention, from fp16 with a unit for each head: it
has tf32's mantissa. That needs 2^25 scores to pay (7wux has 2^27 in a block of the diffusion); `precision.py` decides.
Anywhere else fp32 means fp32.

Where the configuration asks for cuEquivariance's triangle multiplication and cuEquivariance is not installed, Protenix'
own torch code computes it.
"""

from dataclasses import dataclass
from typing import Any

from flashbias.integrations.choice import ConfigurationError
from flashbias.integrations.integration import Integration
from flashbias.patches import Patch, PatchSet

from . import diffusion, local, pair_bias, transition, triangle


@dataclass(frozen=True)
class Settings:
    """bias_cache_gb: memory for the diffusion biases of one target, in 10^9 bytes; 0 keeps none.

    All blocks of the base model need 1.5 KB for each pair of tokens and 12 KB for each atom. Blocks for which nothing
    is left make their bias in every step, as Protenix does.
    """

    bias_cache_gb: float = 8.0

    def __post_init__(self) -> None:
        if not self.bias_cache_gb >= 0:
            raise ConfigurationError(f"bias_cache_gb={self.bias_cache_gb}", "0 or more", "choose one of these")


def sample_diffusion(self: Any, **kwargs: Any) -> Any:
    """`Protenix.sample_diffusion`: the biases that its steps share are kept as long as it runs."""
    budget = int(min(INTEGRATION.settings.bias_cache_gb * 1e9, 1 << 62))
    with diffusion.kept_biases(self, kwargs.get("denoise_net"), budget):
        return self.sample_diffusion_before_flashbias(**kwargs)


INTEGRATION = Integration(
    "protenix",
    PatchSet(
        *triangle.PATCHES,
        pair_bias.PATCH,
        local.PATCH,
        transition.PATCH,
        Patch(
            "protenix.model.protenix:Protenix.sample_diffusion",
            sample_diffusion,
            ("self", "kwargs"),
            keep_as="sample_diffusion_before_flashbias",
        ),
        distribution="protenix",
        versions=">=1.0.0,<3",
    ),
    settings=Settings(),
)
apply, revert, is_applied = INTEGRATION.apply, INTEGRATION.revert, INTEGRATION.is_applied


def configure(*, bias_cache_gb: float = Settings.bias_cache_gb) -> None:
    """Choose how much memory the diffusion biases of one target may take; see `Settings`.

    Raises `ConfigurationError` for less than nothing.
    """
    INTEGRATION.configure(Settings(bias_cache_gb))


INTEGRATION.apply_when_imported()
