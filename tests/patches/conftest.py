"""Stand-in host packages, written to a temporary folder."""

import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

HOST = """
class Base:
    def inherited(self, x):
        return ("inherited", x)


class Host(Base):
    def method(self, x, y=1):
        return ("method", x, y)

    @staticmethod
    def static(x):
        return ("static", x)

    @classmethod
    def of_class(cls, x):
        return ("of_class", cls.__name__, x)

    @property
    def value(self):
        return "value"

    class Inner:
        def method(self, x):
            return ("inner", x)


def function(x):
    return ("function", x)
"""

_numbers = itertools.count()


class StandIn:
    """A host on disk: `name` is that of its module and of its distribution, of version 1.5."""

    def __init__(self, folder: Path, source: str) -> None:
        self.name = f"standin{next(_numbers)}"
        (folder / f"{self.name}.py").write_text(source)
        info = folder / f"{self.name}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {self.name}\nVersion: 1.5\n")
        importlib.invalidate_caches()

    def load(self) -> ModuleType:
        return importlib.import_module(self.name)

    def target(self, path: str) -> str:
        return f"{self.name}:{path}"


@pytest.fixture(autouse=True)
def _enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASHBIAS_DISABLE", raising=False)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., StandIn]]:
    """Makes hosts: `stand_in()` has the classes above, `stand_in(source)` other code."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made: list[StandIn] = []

    def make(source: str = HOST) -> StandIn:
        made.append(StandIn(tmp_path, source))
        return made[-1]

    yield make
    for host in made:
        sys.modules.pop(host.name, None)
