"""Settings of the whole process, which passes need otherwise for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Setting:
    """One that several threads may change at a time: the first finds the user's value, the last restores it."""

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], None]) -> None:
        self._read, self._write = read, write
        self._lock, self._holders, self._users = threading.Lock(), 0, None

    @contextmanager
    def at(self, value: Any) -> Iterator[None]:
        """The setting at a value, the same for all that ask at a time."""
        with self._lock:
            if not self._holders:
                self._users = self._read()
            self._holders += 1
            self._write(value)
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders:
                    self._write(self._users)
