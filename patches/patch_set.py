"""Several patches of one host, applied together or not at all."""

import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import wrapt
from packaging.specifiers import SpecifierSet

from .errors import (
    HostMissingError,
    OtherHostError,
    PatchedOnTopError,
    PatchError,
    PatchWarning,
    UnsupportedVersionError,
)
from .patch import Patch, Seam
from .source import find_source

logger = logging.getLogger(__name__)

# Held while attributes are looked up and set, never while a module is imported: an importing thread holds the import
# lock and may want this one in its hook.
_lock = threading.RLock()


def disabled() -> bool:
    """Whether `FLASHBIAS_DISABLE` is set (to anything but `0` and the empty string)."""
    return os.environ.get("FLASHBIAS_DISABLE", "0") not in ("", "0")


class PatchSet:
    """Patches of one host.

    `distribution` is the host's name in the package index and `versions` a specifier such as `">=1.0,<2"`. A host that
    is not packaged has neither. `recognise` tells it from others that have a module of the same name: a function of
    the source of the first target's module. A host that is recognised so is not imported by `apply`. `host` is what
    to call it, by default its distribution or the module.

    As a context manager the set is applied inside the block, and left as it was found after it.
    """

    def __init__(
        self,
        *patches: Patch,
        distribution: str | None = None,
        versions: str = "",
        host: str | None = None,
        recognise: Callable[[str], bool] | None = None,
    ) -> None:
        self.patches = patches
        self.host = host or distribution or patches[0].module
        self.recognise = recognise
        self.distribution = distribution
        self.versions = SpecifierSet(versions)
        self._seams: list[Seam] = []
        self._callbacks: list[Callable[[PatchSet], Any]] = []
        self._awaited: set[str] | None = None
        self._hooked: set[str] = set()
        self._entered: list[bool] = []

    def __repr__(self) -> str:
        return f"PatchSet({', '.join(patch.target for patch in self.patches)})"

    def is_applied(self) -> bool:
        """Whether every target is the replacement now."""
        return bool(self._seams) and all(seam.holds_replacement() for seam in self._seams)

    def installed(self) -> str | None:
        """The installed version of the host, `"checkout"` for one without versions, None where there is none."""
        if self.distribution is None:
            file = find_source(self.patches[0].module)
            return None if file is None or not self._recognises(file) else "checkout"
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return None

    def is_imported(self) -> bool:
        """Whether every module that is patched has been imported."""
        return all(patch.module in sys.modules for patch in self.patches)

    def obstacle(self) -> PatchError | None:
        """What `apply` would raise, as far as can be told without importing the host; changes nothing."""
        try:
            self._check_host()
            with _lock:
                self._check_foreign()
                if self.is_imported() and not self.is_applied():
                    for patch in self.patches:
                        patch.resolve()
        except PatchError as error:
            return error
        return None

    def apply(self) -> bool:
        """Put every replacement in, importing the host if need be; returns whether anything changed.

        Everything is resolved and checked before anything is changed, and a failure on the way undoes what was done.
        Nothing happens when the set is applied already, or under `FLASHBIAS_DISABLE=1`.
        Raises `HostMissingError`, `OtherHostError`, `UnsupportedVersionError`, `TargetMissingError`,
        `SignatureChangedError`, and `PatchedOnTopError` when a third party has replaced a target since an earlier
        `apply`.
        """
        if disabled():
            logger.info("%r is left out: FLASHBIAS_DISABLE is set", self)
            return False
        if self.is_applied():
            return False
        self._check_host()
        for patch in self.patches:
            if self.recognise is None:
                patch.load()
            elif patch.module not in sys.modules:
                raise HostMissingError(
                    f"{patch.module} has not been imported", self.host, "import it first: its name may be another's"
                )
        with _lock:
            if self.is_applied():  # by another thread, or by a hook that the import has fired
                return False
            self._take_out()  # what is left of an earlier apply when somebody else put an original back
            seams = [patch.resolve() for patch in self.patches]
            _put_all(seams)
            self._seams = seams
        self._tell()
        return True

    def revert(self) -> bool:
        """Put every original back, the identical object; returns whether anything changed.

        Also calls off an `apply_when_imported` that still waits.
        Raises `PatchedOnTopError`, changing nothing, when a third party has replaced a target since.
        """
        with _lock:
            self._awaited = None
            changed = self._take_out()
        if changed:
            self._tell()
        return changed

    def apply_when_imported(self) -> None:
        """Apply now if the host is imported, otherwise as soon as it is.

        A set that cannot be applied then leaves the host as it is and warns (`PatchWarning`): an exception would
        break the import, which may be somebody else's.
        """
        modules = dict.fromkeys(patch.module for patch in self.patches)
        with _lock:
            self._awaited = set(modules)
        for module in modules:
            if module not in self._hooked:
                self._hooked.add(module)
                wrapt.when_imported(module)(partial(self._imported, module))

    def on_change(self, callback: Callable[["PatchSet"], Any]) -> None:
        """Have `callback(patch_set)` called after each `apply` and `revert` that changed something."""
        self._callbacks.append(callback)

    def __enter__(self) -> "PatchSet":
        self._entered.append(self.apply())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._entered.pop():
            self.revert()

    def _check_host(self) -> None:
        if self.distribution is not None:
            self._check_version()
        if self.recognise is None:
            return
        module = self.patches[0].module
        file = find_source(module)
        if file is None:
            raise HostMissingError(f"no module {module}", self.host, "run where it can be imported")
        if not self._recognises(file):
            raise OtherHostError(f"{module} from {file}, which is other code", self.host, "leave this patch out")

    def _recognises(self, file: Path) -> bool:
        return self.recognise is None or self.recognise(file.read_text(encoding="utf-8", errors="replace"))

    def _check_version(self) -> None:
        wanted, found = f"{self.distribution}{self.versions}", self.installed()
        if found is None:
            raise HostMissingError(f"{self.distribution} is not installed", wanted, f"pip install '{wanted}'")
        if not self.versions.contains(found, prereleases=True):
            raise UnsupportedVersionError(
                f"{self.distribution} {found}", wanted, f"pip install '{wanted}', or leave this patch out"
            )

    def _check_foreign(self) -> None:
        foreign = [seam for seam in self._seams if seam.holds_foreign()]
        if foreign:
            raise PatchedOnTopError(
                "; ".join(f"{seam.patch.target} is now {_describe(seam.current())}" for seam in foreign),
                "the replacement that was put there",
                "first undo what was patched on top of it",
            )

    def _take_out(self) -> bool:
        self._check_foreign()
        changed = any(seam.holds_replacement() for seam in self._seams)
        for seam in reversed(self._seams):
            seam.restore()
        self._seams = []
        return changed

    def _imported(self, name: str, module: Any) -> None:
        with _lock:
            self._hooked.discard(name)  # import hooks are called once
            if self._awaited is None:
                return
            self._awaited.discard(name)
            if self._awaited:
                return
        try:
            self.apply()
        except OtherHostError as error:
            logger.debug("%r: %s", self, error)
        except Exception as error:
            warnings.warn(f"{self!r} is not applied, the host is left as it is. {error}", PatchWarning, stacklevel=2)

    def _tell(self) -> None:
        for callback in self._callbacks:
            try:
                callback(self)
            except Exception:
                # The host is already changed, and consistent; whoever listens must not make that look otherwise.
                logger.exception("%r has changed, but %r could not be told", self, callback)


def _describe(value: Any) -> str:
    """A function's `repr` and where it was written: wrappers borrow the name of what they wrap."""
    code = getattr(getattr(value, "__func__", value), "__code__", None)
    return repr(value) if code is None else f"{value!r} of {code.co_filename}, line {code.co_firstlineno}"


def _put_all(seams: list[Seam]) -> None:
    for count, seam in enumerate(seams, start=1):
        try:
            seam.put()
        except Exception as error:
            for done in reversed(seams[:count]):
                done.restore()
            raise PatchError(
                f"{seam.patch.target} cannot be set: {type(error).__name__}: {error}",
                "a class or module whose attributes can be set",
                "leave this patch out",
            ) from error
