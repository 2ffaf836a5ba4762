"""`flashbias run`: somebody's script, unmodified, with patches on.

The script sees what Python would show it: it is the module `__main__`, with its own arguments, `sys.path[0]` and
`__file__`; its exit code and its tracebacks are its own. Processes that it starts with `multiprocessing`, by whatever
method, have the patches on too. Other programs that it starts have not.

torch is imported before the script: environment variables that torch reads at its import belong into the environment.
"""

from __future__ import annotations

import atexit
import builtins
import importlib
import io
import os
import pkgutil
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from types import ModuleType, TracebackType
from typing import Any

from flashbias.errors import FlashBiasError
from flashbias.integrations import available
from flashbias.patches import Patch, PatchSet, disabled


class RunError(FlashBiasError, ValueError):
    """There is no such patch, or no such script."""


class Launch(BaseException):
    """Raised by the command to leave the frames of the command line: the program starts from there."""

    def __init__(self, program: Program) -> None:
        self.program = program


def switch_on(names: Sequence[str]) -> None:
    """Apply the integrations `names`, each as soon as its host is imported, here and in processes started from here.

    What there is to say of them at the end of this process goes to stderr. Raises `RunError` for an unknown name.
    """
    unknown = sorted(set(names) - available().keys())
    if unknown or not names:
        found = ", ".join(unknown) or "nothing"
        raise RunError(f"--patch {found}", " or ".join(available()), "choose from these, with commas between several")
    atexit.register(_report, names)
    _apply(names)


@dataclass(frozen=True)
class Program:
    """A script (a file, or a folder or archive that holds a `__main__.py`), or a module, and its arguments."""

    target: str
    arguments: tuple[str, ...] = ()
    is_module: bool = False

    def check(self) -> Program:
        """Raise `RunError` where there is no such script. Whether there is a module is seen when it is started."""
        if not self.is_module and not os.path.exists(self.target):
            raise RunError(f"no file {self.target}", "a script, or -m and a module", "name it without python")
        return self

    def start(self) -> None:
        """Run it in a fresh `__main__`, which stays there for those who look it up when the script has ended."""
        main = sys.modules["__main__"] = ModuleType("__main__")
        vars(main).update(__builtins__=builtins, __loader__=None)
        if sys.version_info < (3, 14):  # later ones make it when it is asked for
            vars(main).update(__annotations__={})
        sys.argv = [self.target, *self.arguments]
        # What `python -m` calls: the same errors, the same frames. A type checker does not know it, for its underscore.
        run_as_main: Any = runpy._run_module_as_main  # type: ignore[attr-defined]
        path = os.path.join(os.getcwd(), self.target)  # as Python does it: absolute, and otherwise as it was written
        try:
            if self.is_module:
                sys.argv[0] = "-m"
                _set_first_path(os.getcwd())
                run_as_main(self.target)
            elif pkgutil.get_importer(self.target) is not None:
                _set_first_path(path)
                run_as_main("__main__", alter_argv=False)
            else:
                _set_first_path(os.path.dirname(os.path.realpath(path)))
                vars(main).update(__file__=path, __cached__=None, __loader__=SourceFileLoader("__main__", path))
                with io.open_code(path) as file:
                    source = file.read()
                exec(compile(source, path, "exec", dont_inherit=True), vars(main))
        except SystemExit:
            raise
        except BaseException as error:
            _hide_our_frames(error)
            raise


def _set_first_path(folder: str) -> None:
    """In Python's safe mode (`-P`) no folder is put before the others."""
    if not getattr(sys.flags, "safe_path", False):  # since Python 3.11
        sys.path[0] = folder


def _hide_our_frames(error: BaseException) -> None:
    """Whoever shows the error at the end, Python or a hook of the script, shows it from the script's first frame on.

    The traceback itself cannot be cut here: it grows again while the error makes its way out.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals is globals():
        trace = trace.tb_next
    show = sys.excepthook

    def excepthook(kind: type[BaseException], value: BaseException, _: TracebackType | None) -> None:
        show(kind, value.with_traceback(trace), trace)

    sys.excepthook = excepthook


def _apply(names: Sequence[str]) -> None:
    _SPAWNED.names = tuple(dict.fromkeys((*_SPAWNED.names, *names)))
    _SPAWN.apply_when_imported()
    for name in names:
        importlib.import_module(available()[name])


class _Spawned:
    """Stands among what a process tells one that it spawns, and applies the patches where it is unpickled.

    That is the only moment before the new process imports the main module.
    """

    names: tuple[str, ...] = ()

    def __reduce__(self) -> Any:
        return _apply, (self.names,)


def _get_preparation_data(name: str) -> dict[str, Any]:
    from multiprocessing import spawn

    return vars(spawn)["get_preparation_data_before_flashbias"](name) | {"flashbias": _SPAWNED}


_SPAWNED = _Spawned()
_SPAWN = PatchSet(
    Patch(
        "multiprocessing.spawn:get_preparation_data",
        _get_preparation_data,
        ("name",),
        keep_as="get_preparation_data_before_flashbias",
    )
)


def _report(names: Sequence[str]) -> None:
    """Say the worst difference, if calls were compared, and which patches were asked for in vain."""
    from flashbias.integrations import verify
    from flashbias.integrations.integration import was_called

    if compared := verify.differences():
        worst = max(compared, key=lambda entry: entry.difference / (entry.largest or 1))
        entry = f"{worst.difference:.2e} beside entries of up to {worst.largest:.2e}, in {worst.layer}"
        print(f"flashbias: worst difference {entry}", file=sys.stderr)
    for name in names:
        integration = sys.modules[available()[name]].INTEGRATION
        if was_called(name):
            continue
        if disabled():
            reason = "was not applied: FLASHBIAS_DISABLE is set"
        elif not integration.is_applied():
            hosts = (f"{host.module}: {host.reason or 'never imported'}" for host in integration.status())
            reason = f"was not applied. {'; '.join(hosts)}"
        else:
            reason = "was applied, but nothing that it replaces was called in this process"
        print(f"flashbias: {name} {reason}", file=sys.stderr)
