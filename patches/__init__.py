"""How a replacement is put into somebody else's class or module, and taken out again.

A `Patch` is data, a `PatchSet` applies several of them together or not at all:

    patch = Patch("host.module:Class.method", replacement, ("self", "x"))
    patches = PatchSet(patch, distribution="host", versions=">=1,<2")
    patches.apply()  # resolves and checks everything first
    patches.revert()  # the identical object is back

Nothing here knows of attention or of torch. `FLASHBIAS_DISABLE=1` in the environment leaves every host alone.
"""

from .errors import (
    HostMissingError,
    OtherHostError,
    PatchedOnTopError,
    PatchError,
    PatchWarning,
    SignatureChangedError,
    TargetMissingError,
    UnsupportedVersionError,
)
from .patch import Patch
from .patch_set import PatchSet, disabled
from .source import attributes_read

__all__ = [
    "HostMissingError",
    "OtherHostError",
    "Patch",
    "PatchError",
    "PatchSet",
    "PatchWarning",
    "PatchedOnTopError",
    "SignatureChangedError",
    "TargetMissingError",
    "UnsupportedVersionError",
    "attributes_read",
    "disabled",
]
