"""Language models with ALiBi in Hugging Face transformers 4.57 to 5.x: BLOOM, MPT, and Falcon with `alibi=True`.

Importing this module patches the three, each at once or when it is imported; `revert()` undoes it. Weights, caches,
`generate()`, padding and training stay what they are. Memory grows with the length and not with its square: neither
masks nor ALiBi tensors `(B, H, N, N)` are made, positions are exact in every dtype, and nothing waits for the device.

- Positions are those of the hosts: BLOOM and Falcon count tokens (padding and holes left out), MPT counts keys.
- MPT may have more keys than its `max_seq_len`.
- Falcon is what its SDPA path computes, with the bfloat16 products that the host makes of slopes and positions in every
  dtype; its eager path, which adds ALiBi twice, gives other results. Long calls in half precision have them as
  factors, a single query as the row of its bias, other calls as positions of each head.
- A query that may attend nowhere (padding on the left) gets 0; the hosts give it some mean of values.

Left to the hosts' own code, said once in the log: `output_attentions`, attention dropout in training, head masks, masks
of other than two dimensions, other attention implementations than eager and SDPA.

`configure(served="asked")` serves only models that were opened with `attn_implementation="factored_bias"`, a name that
is known as soon as this module is imported. Models of other kinds may take that name too: they get the same operator
with their own masks, T5, mT5 and UMT5 from transformers 5.18 on with their position biases, as dense as they make them
(`flashbias.integrations.t5` has them as tables). After `revert()` the name stays known: BLOOM and MPT run their own
code then, Falcon its eager path.
"""

from dataclasses import dataclass

from flashbias.integrations.choice import ConfigurationError
from flashbias.integrations.integration import Integration

from . import hosts, interface
from .hosts import NAME

__all__ = ["INTEGRATION", "NAME", "Settings", "apply", "configure", "is_applied", "revert"]


@dataclass(frozen=True)
class Settings:
    """served: "all" models of the three kinds, or those that were "asked" for by their attention's name."""

    served: str = "all"

    def __post_init__(self) -> None:
        if self.served not in ("all", "asked"):
            raise ConfigurationError(f"served={self.served!r}", "'all' or 'asked'", "choose one of these")


INTEGRATION = Integration("alibi", *interface.HOSTS, settings=Settings())
apply, revert, is_applied = INTEGRATION.apply, INTEGRATION.revert, INTEGRATION.is_applied


def configure(*, served: str = "all") -> None:
    """Choose which models are served; see `Settings`.

    Raises `ConfigurationError` for a choice that does not exist.
    """
    settings = Settings(served)
    hosts.SERVED[:] = [settings.served]
    INTEGRATION.configure(settings)


interface.register()
INTEGRATION.apply_when_imported()
