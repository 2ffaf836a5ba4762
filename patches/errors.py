"""What can stand in the way of a patch. Each error says what was found, what is wanted and what to do."""

from flashbias.errors import FlashBiasError


class PatchError(FlashBiasError):
    """A patch cannot be applied or taken out; the host is as it was before the call."""


class HostMissingError(PatchError, ImportError):
    """The host is not installed, or importing it fails."""


class OtherHostError(PatchError):
    """A module has the name of the host's, and is another project's."""


class UnsupportedVersionError(PatchError):
    """The installed version of the host is not one that the patch was written for."""


class TargetMissingError(PatchError, AttributeError):
    """The host has no class, method or function of the target's name."""


class SignatureChangedError(PatchError, TypeError):
    """The target is no function, or its parameters are not those that the replacement was written for."""


class PatchedOnTopError(PatchError, RuntimeError):
    """Somebody else has replaced the target since; taking the patch out would undo theirs."""


class PatchWarning(UserWarning):
    """A host that has just been imported could not be patched, and works as if nobody had asked for it."""
