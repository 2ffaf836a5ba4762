"""One module per host project. Importing it patches that host, at once or as soon as the host is imported.

import flashbias.integrations.swin_v2  # SwinV2 from now on; swin_v2.revert() undoes it
"""


def available() -> dict[str, str]:
    """The module of every integration, by name; imports none of them, nor a host.

    Each module has `apply`, `revert`, `is_applied`, `configure` and `INTEGRATION`, whose `status()` tells of its hosts.
    """
    return {name: f"{__name__}.{name}" for name in ("swin_v2", "protenix", "alibi", "t5", "neural_solver")}
