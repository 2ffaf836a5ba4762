"""Which models the integration serves."""

from __future__ import annotations

from typing import Any

from flashbias.integrations import language_models
from flashbias.integrations.integration import say_once
from flashbias.integrations.language_models import NAME

# Which models are served: "all", or those that have asked for it by `NAME`. `configure` sets it.
SERVED = ["all"]


def leaves(host: str, implementation: str, tokens: Any) -> bool:
    """Whether a model's call is left to the host, said once."""
    if implementation != NAME and SERVED[0] != "all":
        reason = f"a model without attn_implementation={NAME!r}"
        say_once(f"alibi: {host}: {reason} is not covered, the host's own code computes it")
        return True
    return language_models.leaves(f"alibi: {host}", implementation, tokens)
