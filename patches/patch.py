"""One patch: where it goes, what it puts there, and what it expects to find."""

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from .errors import HostMissingError, PatchError, SignatureChangedError, TargetMissingError


@dataclass(frozen=True)
class Patch:
    """A function of a host and what replaces it.

    `target` is `"package.module:Class.method"` or `"package.module:function"`; a method may be inherited, static or a
    class method. `replacement` is a plain function that takes what the target takes, `self` or `cls` included.

    `parameters` are the names that the target's parameters must have, in order, `self` or `cls` included. They are
    matched exactly; if the replacement takes `**kwargs`, the target may have others besides.

    `keep_as` is the name of an attribute beside the target that holds the original while the patch is applied, for a
    replacement that hands some calls on. (TorchScript finds only what hangs on the class; so does a reader.)
    """

    target: str
    replacement: Callable[..., Any]
    parameters: tuple[str, ...]
    keep_as: str | None = None

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    def load(self) -> None:
        """Import the target's module. Raises `HostMissingError` when that fails, whatever the reason."""
        try:
            importlib.import_module(self.module)
        except Exception as error:
            raise HostMissingError(
                f"importing {self.module} raises {type(error).__name__}: {error}",
                f"{self.module}, to patch {self.target}",
                "install the host, or repair its installation",
            ) from error

    def resolve(self) -> "Seam":
        """Find the target in its (imported) module and check its parameters, changing nothing.

        Raises `TargetMissingError` or `SignatureChangedError`.
        """
        owner: Any = sys.modules[self.module]
        *parents, name = self.target.partition(":")[2].split(".")
        for parent in parents:
            owner = getattr(owner, parent, None)
        # Static lookup: a plain getattr would turn static and class methods into what they are called through.
        original = None if owner is None else inspect.getattr_static(owner, name, None)
        if original is None:
            raise TargetMissingError(
                f"{self.module} without {self.target.partition(':')[2]}",
                f"{self.target}",
                "use a version of the host that has it, or leave this patch out",
            )
        self._check_parameters(original)
        if self.keep_as is not None and hasattr(owner, self.keep_as):
            raise PatchError(
                f"{self.target} beside an attribute that is already called {self.keep_as}",
                "a free name to keep the original under",
                "revert the patch that put it there",
            )
        return Seam(self, owner, name, original, inherited=name not in vars(owner))

    def _check_parameters(self, original: Any) -> None:
        function = original.__func__ if isinstance(original, (staticmethod, classmethod)) else original
        wanted = f"{self.target} as a function of ({', '.join(self.parameters)})"
        remedy = "use a version of the host that this patch was written for, or leave the patch out"
        try:
            if isinstance(function, type):
                raise TypeError("a class")
            names = tuple(inspect.signature(function).parameters)
        except (TypeError, ValueError) as error:
            raise SignatureChangedError(f"{type(original).__name__} {original!r}", wanted, remedy) from error
        if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(self.replacement).parameters.values()):
            names = tuple(name for name in names if name in self.parameters)
        if names != self.parameters:
            raise SignatureChangedError(f"the parameters ({', '.join(names)})", wanted, remedy)


class Seam:
    """A resolved patch: the class or module that owns the target, and the raw attributes before and after."""

    def __init__(self, patch: Patch, owner: Any, name: str, original: Any, inherited: bool) -> None:
        self.patch, self.owner, self.name = patch, owner, name
        self.original, self.inherited = original, inherited
        wrapper = type(original) if isinstance(original, (staticmethod, classmethod)) else None
        self.installed = wrapper(patch.replacement) if wrapper else patch.replacement

    def current(self) -> Any:
        """The raw attribute that is at the target now, inherited or not."""
        return inspect.getattr_static(self.owner, self.name, None)

    def holds_replacement(self) -> bool:
        return self.current() is self.installed

    def holds_foreign(self) -> bool:
        """Whether the target is neither the replacement nor the original."""
        return self.current() is not self.installed and self.current() is not self.original

    def put(self) -> None:
        """Put the replacement in. Plain `setattr`: torch.compile does not see through wrapt's function wrappers."""
        if self.patch.keep_as is not None:
            setattr(self.owner, self.patch.keep_as, _renamed(self.original, self.patch.keep_as))
        setattr(self.owner, self.name, self.installed)

    def restore(self) -> None:
        """Put the original back; an inherited one comes back when what hides it is gone."""
        if self.holds_replacement():
            if self.inherited:
                delattr(self.owner, self.name)
            else:
                setattr(self.owner, self.name, self.original)
        if self.patch.keep_as is not None and self.patch.keep_as in vars(self.owner):
            delattr(self.owner, self.patch.keep_as)


def _renamed(original: Any, name: str) -> Any:
    """The same function under another name. TorchScript compiles a method under the name that its function carries."""
    if not isinstance(original, FunctionType):
        return original
    copy = FunctionType(original.__code__, original.__globals__, name, original.__defaults__, original.__closure__)
    copy.__kwdefaults__ = original.__kwdefaults__
    copy.__annotations__ = original.__annotations__
    copy.__doc__, copy.__module__, copy.__qualname__ = original.__doc__, original.__module__, original.__qualname__
    copy.__dict__.update(original.__dict__)
    return copy
