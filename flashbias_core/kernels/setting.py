"""Settings of the whole process, which passes need otherwise for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Setting:
    """One that is held at a value, by several threads at a time: the first finds the user's, the last restores it."""

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], None], value: Any) -> None:
        self._read, self._write, self._value = read, write, value
        self._lock, self._holders, self._users = threading.Lock(), 0, None

    @contextmanager
    def held(self) -> Iterator[None]:
        """The setting at the value."""
        with self._lock:
            if not self._holders:
                self._users = self._read()
            self._write(self._value)
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders:
                    self._write(self._users)
