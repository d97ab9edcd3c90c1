"""What rows were read from, and whether it is still as it was: files that were read, folders that were listed, and
names that were looked for in vain.

Readers say so by `depend_on`, before they look: what changes while they read is then found changed later.
"""

import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import numpy as np

MISSING = (-1, -1, -1)
AT_ONCE = 4096


class Origin:
    """Paths, and of each how it was: size, time of change, and time of change of its status too, which no program can
    set back (on Windows that of its creation); all -1 where there is none."""

    def __init__(self) -> None:
        self._noted: set[bytes] = set()
        self.states = array("q")
        self._paths = bytearray()

    @property
    def paths(self) -> bytes:
        return bytes(self._paths)

    def note(self, path: bytes) -> None:
        if path not in self._noted and b"\0" not in path:
            self._noted.add(path)
            self._paths += path + b"\0"
            self.states.extend(_state(path))

    @property
    def newest(self) -> int:
        """When something of it changed last, in nanoseconds since the epoch."""
        return max(np.array(self.states, dtype=np.int64).reshape(-1, 3)[:, 2], default=0)


def is_unchanged(paths: memoryview, states: np.ndarray) -> bool:
    """Whether all that was noted is as it was; nothing is read."""
    names = bytes(paths).split(b"\0")[:-1]
    for start in range(0, len(names), AT_ONCE):
        now = [_state(name) for name in names[start : start + AT_ONCE]]
        if not np.array_equal(np.array(now, dtype=np.int64), states[start : start + AT_ONCE]):
            return False
    return True


def _state(path: bytes) -> tuple[int, int, int]:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return MISSING
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


_origin: ContextVar[Origin | None] = ContextVar("_origin", default=None)


@contextmanager
def noting() -> Iterator[Origin]:
    """Inside, what is noted stands in this origin."""
    origin = Origin()
    token = _origin.set(origin)
    try:
        yield origin
    finally:
        _origin.reset(token)


def depend_on(path: str | Path) -> None:
    """Say, before looking, that the rows depend on this: a file, what a folder holds, or that there is nothing."""
    if origin := _origin.get():
        origin.note(os.fsencode(path))
