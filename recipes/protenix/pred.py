"""`flashbias protenix pred`: Protenix' own command, patched."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from flashbias.recipes.run import switch_on

from .host import ModelError


def predict(arguments: Sequence[str]) -> None:
    """Run `protenix pred` with these arguments; what it returns, prints and writes is its own.

    Raises a `flashbias.patches.PatchError` where Protenix is missing or cannot be patched, before anything is computed.
    """
    switch_on(["protenix"])
    integration = importlib.import_module("flashbias.integrations.protenix")
    integration.apply()
    try:
        command = importlib.import_module("runner.batch_inference").protenix_cli
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"the command of Protenix cannot be imported: {type(error).__name__}: {error}",
            "protenix >= 1.0.0, < 3 with its dependencies",
            "pip install protenix",
        ) from error
    sys.argv = ["protenix", "pred", *arguments]
    command(args=["pred", *arguments], prog_name="protenix")
