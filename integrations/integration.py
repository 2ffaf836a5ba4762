"""What every integration shares: switching it on and off, handing calls over to the host, and checking itself.

An integration is a `PatchSet` for each host, and for each patched method a `Replacement`: the function that computes
it, and the function that says which calls are not covered.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashbias.attention import DTYPES, MAX_HEAD_DIM
from flashbias.patches import OtherHostError, PatchError, PatchSet

from . import profile, verify

P = ParamSpec("P")
logger = logging.getLogger("flashbias.integrations")

_said: set[str] = set()
_called: set[str] = set()


@dataclass(frozen=True)
class HostStatus:
    """What is known of a host without importing it.

    `host` is its distribution or a name, `module` what is patched. `installed` is its version, `"checkout"` where it
    has none, None where it is missing; `supported` the versions that can be patched, as a specifier. `ok`: nothing is
    known to stand in the way of the patch, otherwise `reason` says what. `patched`: it runs the replacement now.
    """

    host: str
    module: str
    installed: str | None
    supported: str
    ok: bool
    reason: str
    patched: bool


class Integration:
    """One model, in one host or several that have the same code, and the settings of its replacement.

    A packaged host is imported to be patched. The module of another may belong to any project: it is patched when
    somebody imports it, if it is recognised.
    """

    def __init__(self, name: str, *hosts: PatchSet, settings: Any = None) -> None:
        self.name, self.hosts, self.settings = name, hosts, settings
        for host in hosts:
            host.on_change(_forget_compiled)

    def apply(self) -> bool:
        """Patch the hosts that are there, importing packaged ones; returns whether anything changed.

        Nothing changes where a host is patched already, or under `FLASHBIAS_DISABLE=1`.
        Raises a `flashbias.patches.PatchError` for a host that cannot be patched, and leaves that host as it is; but
        one that is not imported is passed over where another is patched.
        """
        changed = False
        refusals: list[tuple[PatchSet, PatchError]] = []
        for host in self.hosts:
            if host.recognise is not None and not host.is_imported():
                host.apply_when_imported()
                continue
            try:
                changed |= host.apply()
            except OtherHostError as error:
                logger.debug("%s: %s", self.name, error)
            except PatchError as error:
                refusals.append((host, error))
        for host, refusal in refusals:
            if host.is_imported() or not self.is_applied():
                raise refusal
            logger.info("%s: %s", self.name, refusal)
        return changed

    def apply_when_imported(self) -> None:
        """Patch each host now if it is imported, otherwise as soon as it is; what cannot be is warned about."""
        for host in self.hosts:
            host.apply_when_imported()

    def revert(self) -> bool:
        """Give the hosts their own code back, the identical functions; returns whether anything changed.

        Raises `flashbias.patches.PatchedOnTopError` when somebody else has patched the same functions since; other
        hosts are reverted all the same.
        """
        changed, refusal = False, None
        for host in self.hosts:
            try:
                changed |= host.revert()
            except PatchError as error:
                refusal = error
        if refusal is not None:
            raise refusal
        return changed

    def is_applied(self) -> bool:
        """Whether any host runs the replacement now; `status()` tells which."""
        return any(host.is_applied() for host in self.hosts)

    def status(self) -> list[HostStatus]:
        """What is known of each host; imports none."""
        found = []
        for host in self.hosts:
            obstacle = host.obstacle()
            found.append(
                HostStatus(
                    host=host.host,
                    module=host.patches[0].module,
                    installed=host.installed(),
                    supported=str(host.versions),
                    ok=obstacle is None,
                    reason="" if obstacle is None else str(obstacle),
                    patched=host.is_applied(),
                )
            )
        return found

    def configure(self, settings: Any) -> None:
        """Choose how the replacement works from the next call on."""
        if settings != self.settings:
            self.settings = settings
            _forget_compiled()


@dataclass(frozen=True)
class Replacement:
    """What a patched method does with a call: compute it, or hand it to the host's own code.

    `name` is the integration's, and behind a space what is computed, where there are several.
    `forward(module, ...)` computes the call. `not_covered(module, ...)` returns why it cannot, or None; it reads
    nothing that `torch.compile` cannot. `original` is the attribute under which the patch keeps the host's method.
    """

    name: str
    forward: Callable[..., Any]
    not_covered: Callable[..., str | None]
    original: str

    def __call__(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        reason = _out_of_reach(args) or self.not_covered(module, *args, **kwargs)
        if reason is not None:
            say_once(f"{self.name}: {reason} is not covered, the host's own code computes it")
            return self.host_of(module)(*args, **kwargs)
        _note_call(self.name)
        if torch.compiler.is_compiling() or not self.is_watched(*args, **kwargs):
            return self.forward(module, *args, **kwargs)
        if verify.wanted(module):
            return verify.compare(module, self.rehearsal_of(module), self._run, args, kwargs)
        return self._run(module, *args, **kwargs)

    def host_of(self, module: Any) -> Callable[..., Any]:
        """The host's own code for the module."""
        return getattr(module, self.original)

    def rehearsal_of(self, module: Any) -> Callable[..., Any]:
        """The same, leaving no trace in its arguments."""
        return self.host_of(module)

    def is_watched(self, *args: Any, **kwargs: Any) -> bool:
        """Whether eager calls are compared or timed."""
        return verify.enabled() or profile.enabled()

    def _run(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if profile.enabled():
            return profile.timed(module, self.forward, args, kwargs)
        return self.forward(module, *args, **kwargs)


def run_while_traced(function: Callable[P, bool]) -> Callable[P, bool]:
    """Under torch.compile: called while the graph is made, without a break in it.

    That is `torch.compiler.assume_constant_result`, which would load the compiler at once: a second of every start.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


@run_while_traced
def say_once(message: str) -> bool:
    """Log a message, unless it has been logged before; returns whether it has just been logged."""
    if message in _said:
        return False
    _said.add(message)
    logger.warning(message)
    return True


def was_called(name: str) -> bool:
    """Whether a replacement of that integration has computed anything in this process, or become part of a graph."""
    return any(called.partition(" ")[0] == name for called in _called)


@run_while_traced
def _note_call(name: str) -> bool:
    _called.add(name)
    return True


def not_computable(x: Tensor, head_dim: int = 1) -> str | None:
    """Why the operator cannot compute attention of that head dim from an input x, or None."""
    device = x.device.type
    if device not in ("cpu", "cuda"):
        return f"a tensor on {device}"
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if dtype not in DTYPES:
        return f"{dtype}"
    if head_dim > MAX_HEAD_DIM:
        return f"head dim {head_dim}"
    return None


def is_hooked(module: torch.nn.Module) -> bool:
    """Whether somebody looks at what goes into a module or comes out of it."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _out_of_reach(args: tuple[Any, ...]) -> str | None:
    """Tracers that must find operations that they know, and transforms that the operator has no rule for."""
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    for arg in args:
        if isinstance(arg, torch.fx.Proxy):
            return "torch.fx"
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    return None


def _forget_compiled(patches: PatchSet | None = None) -> None:
    """Have compiled models compiled anew: a graph does not see that the code which it was made from has changed."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
