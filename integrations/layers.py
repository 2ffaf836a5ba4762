"""Layers of somebody's model: what they are called, and a table with a row for each."""

import atexit
import sys
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from torch.nn import Module

T = TypeVar("T")


class Rows(Generic[T]):
    """One row for each module, in the order of first calls; `report` prints them to stderr when the process ends."""

    def __init__(self, report: Callable[[], None]) -> None:
        self._report, self._registered = report, False
        self._of_module: WeakKeyDictionary[Module, T] = WeakKeyDictionary()
        self.rows: list[T] = []  # outlive their modules

    def __contains__(self, module: Module) -> bool:
        return module in self._of_module

    def of(self, module: Module, make: Callable[[str], T]) -> T:
        """The module's row; at its first call `make(name)`."""
        row = self._of_module.get(module)
        if row is None:
            if not self._registered:
                atexit.register(self._report)
                self._registered = True
            name = name_in_model(module) or f"{type(module).__name__} {len(self.rows)}"
            row = self._of_module[module] = make(name)
            self.rows.append(row)
        return row

    def forget(self) -> None:
        """Start anew."""
        self._of_module.clear()
        self.rows.clear()


def name_in_model(module: Module) -> str:
    """The name of a module that is being called, within the outermost module that is; empty where it is that one.

    Found by the callers' `self`, since a module does not know its model.
    """
    frame = sys._getframe()
    callers: list[Module] = []
    while frame.f_back is not None:
        frame = frame.f_back
        caller = frame.f_locals.get("self")
        if isinstance(caller, Module) and (not callers or caller is not callers[-1]):
            callers.append(caller)
    for model in reversed(callers):
        for name, part in model.named_modules():
            if part is module:
                return name
    return ""


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print to stderr, the first column unbroken; nothing where there are no rows."""
    from rich.console import Console
    from rich.table import Column, Table

    first, *others = columns
    table = Table(Column(first, no_wrap=True), *others, title=title)
    for row in rows:
        table.add_row(*row)
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = max(console.width, 160)  # in a file nothing has to be cut off
    if rows:
        console.print(table)
