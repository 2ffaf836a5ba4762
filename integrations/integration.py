"""What every integration shares: switching it on and off, handing calls over to the host, and checking itself.

An integration is a `PatchSet`, and for each patched method a `Replacement`: the function that computes it, and the
function that says which calls are not covered.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from flashbias.errors import FlashBiasError
from flashbias.patches import PatchSet

from . import verify

logger = logging.getLogger("flashbias.integrations")

_said: set[str] = set()


class ConfigurationError(FlashBiasError, ValueError):
    """An integration has no such mode."""


@dataclass(frozen=True)
class HostStatus:
    """What is known of a host without importing it.

    `host` is its distribution or a name, `module` what is patched. `installed` is its version, None where it is
    missing; `supported` the versions that can be patched, as a specifier. `ok`: nothing is known to stand in the way
    of the patch, otherwise `reason` says what. `patched`: it runs the replacement now.
    """

    host: str
    module: str
    installed: str | None
    supported: str
    ok: bool
    reason: str
    patched: bool


class Integration:
    """One host: a patch set, and the modes in which the replacement can work."""

    def __init__(self, name: str, patches: PatchSet, modes: tuple[str, ...] = ("exact",)) -> None:
        self.name, self.patches, self.modes = name, patches, modes
        self.mode = modes[0]
        patches.on_change(_forget_compiled)

    def apply(self) -> bool:
        """Patch the host, importing it if need be; returns whether anything changed.

        Nothing changes when the host is patched already, or under `FLASHBIAS_DISABLE=1`.
        Raises a `flashbias.patches.PatchError`, and leaves the host as it is, where the host cannot be patched.
        """
        return self.patches.apply()

    def revert(self) -> bool:
        """Give the host its own code back, the identical functions; returns whether anything changed.

        Raises `flashbias.patches.PatchedOnTopError` when somebody else has patched the same functions since.
        """
        return self.patches.revert()

    def is_applied(self) -> bool:
        """Whether the host runs the replacement now."""
        return self.patches.is_applied()

    def status(self) -> list[HostStatus]:
        """What is known of each host; imports none."""
        obstacle = self.patches.obstacle()
        return [
            HostStatus(
                host=self.patches.distribution or self.name,
                module=self.patches.patches[0].module,
                installed=self.patches.installed(),
                supported=str(self.patches.versions),
                ok=obstacle is None,
                reason="" if obstacle is None else str(obstacle),
                patched=self.patches.is_applied(),
            )
        ]

    def configure(self, *, mode: str) -> None:
        """Choose how the replacement works from the next call on. Raises `ConfigurationError` for an unknown mode."""
        if mode not in self.modes:
            raise ConfigurationError(
                f"mode={mode!r} for {self.name}", " or ".join(map(repr, self.modes)), "choose one of these"
            )
        if mode != self.mode:
            self.mode = mode
            _forget_compiled(self.patches)


@dataclass(frozen=True)
class Replacement:
    """What a patched method does with a call: compute it, or hand it to the host's own code.

    `forward(module, ...)` computes the call. `not_covered(module, ...)` returns why it cannot, or None; it reads
    nothing that `torch.compile` cannot. `original` is the attribute under which the patch keeps the host's method.
    """

    name: str
    forward: Callable[..., Any]
    not_covered: Callable[..., str | None]
    original: str

    def __call__(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        reason = _traced_by_python(args) or self.not_covered(module, *args, **kwargs)
        if reason is not None:
            say_once(f"{self.name}: {reason} is not covered, the host's own code computes it")
            return getattr(module, self.original)(*args, **kwargs)
        if not torch.compiler.is_compiling() and verify.enabled():
            return verify.compare(module, getattr(module, self.original), self.forward, args, kwargs)
        return self.forward(module, *args, **kwargs)


@torch.compiler.assume_constant_result  # under torch.compile: said while the graph is made, without a break in it
def say_once(message: str) -> bool:
    """Log a message, unless it has been logged before; returns whether it has just been logged."""
    if message in _said:
        return False
    _said.add(message)
    logger.warning(message)
    return True


def _traced_by_python(args: tuple[Any, ...]) -> str | None:
    """These two tracers record the host's operations one by one, and must find those that they know."""
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if any(isinstance(arg, torch.fx.Proxy) for arg in args):
        return "torch.fx"
    return None


def _forget_compiled(patches: PatchSet) -> None:
    """Have compiled models compiled anew: a graph does not see that the code which it was made from has changed."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
