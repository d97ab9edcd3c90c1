"""A folder of files that all processes together keep below a limit, by deleting what was used longest ago.

Files are written under a temporary name and renamed, so that whoever reads one reads the whole of it. What they take is
counted in a file, under a lock, for each one written. The count may be too high, of files that were deleted by hand or
killed while written, until `Store.shrink` looks again.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

T = TypeVar("T")
SUFFIX = ".safetensors"

DISK_SHARE = 0.9
"""The share of what is free on the disk that may be filled."""

ABANDONED_SECONDS = 24 * 3600
"""A temporary file this old belongs to no running process."""

LOCK_SECONDS = 30
"""A lock that takes longer is not waited for: each process then keeps the limit by itself."""

COUNT, COPY = "count", "count.copy"
"""The first is locked while it is read or written, by older releases too. Where a locked file cannot be read (Windows),
or has been emptied (by older filelocks), the second is read."""


@dataclass(frozen=True, slots=True)
class Use:
    """What a store holds."""

    entries: int
    num_bytes: int
    oldest: float | None
    """Seconds since the epoch, of the entry that was used longest ago."""


class Store:
    """The entries of a folder, by name. Errors of the disk are raised as they come (OSError).

    Attributes:
        limit: bytes that the folder may hold, whoever fills it.
        own: names that whoever holds this object still needs: it evicts none of them.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder = folder
        self.limit = limit
        self.own: set[str] = set()
        self._left_free: int | None = None  # bytes of the disk that stay free; None: nobody has looked
        self._lock = FileLock(folder / COUNT, timeout=LOCK_SECONDS)
        self._lockable = True

    def path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}{SUFFIX}"

    def __contains__(self, name: str) -> bool:
        return self.path(name).exists()

    def use(self) -> Use:
        entries = self._entries()
        return Use(len(entries), sum(size for _, size, _ in entries), min((used for used, *_ in entries), default=None))

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def get(self, name: str, read: Callable[[Path], T | None]) -> T | None:
        """What ``read`` makes of the file of an entry, which was used now; where that is None, the entry is deleted."""
        path = self.path(name)
        content = read(path)
        with suppress(OSError):  # a folder of somebody else's may be read only
            os.utime(path) if content is not None else path.unlink(missing_ok=True)
        return content

    def put(self, name: str, num_bytes: int, write: Callable[[Path], object]) -> None:
        """Have ``write`` make the file of an entry, if it fits and no other process was faster."""
        if not self.fits(num_bytes):
            return
        path = self.path(name)
        with self._locked():  # held while writing, which takes a moment
            if path.exists() or not self._allowed(num_bytes):
                return
            path.parent.mkdir(exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
            os.close(handle)
            try:
                write(Path(temporary))
                self._note(self._counted() + num_bytes)  # if it is killed here, too much is counted
                os.replace(temporary, path)
            finally:
                Path(temporary).unlink(missing_ok=True)

    def fits(self, num_bytes: int) -> bool:
        """Whether an entry of this size may be put, unless another process is faster."""
        if self._left_free is None:
            self.make_room(0)
        with self._locked():
            return self._allowed(num_bytes)

    def make_room(self, wanted: int) -> int:
        """Evict until ``wanted`` bytes fit, or nothing is left that is not one's own; the bytes that do."""
        used = self.shrink(self.limit - wanted)
        self._leave_free()
        return self._room(used)

    def room(self) -> int:
        """The bytes that fit as it is. Nothing is evicted, and no entry looked at."""
        self._leave_free()
        with self._locked():
            return self._room(self._counted())

    def room_for(self, wanted: int) -> int:
        """The bytes that `make_room` would give if none of what is there is one's own. Nothing is evicted."""
        used = self.use().num_bytes
        left = min(used, max(0, self.limit - wanted))
        return max(0, min(self.limit - left, int(DISK_SHARE * (self._free() + used - left))))

    def shrink(self, limit: int) -> int:
        """Evict the entries used longest ago, but not one's own, until ``limit`` bytes are left; the bytes left.

        Any number of processes may do so at a time: a reader finds its entry gone, as if it had never been there.
        """
        if not self.folder.exists():
            return 0
        if not os.access(self.folder, os.W_OK):  # nothing can go
            return self.use().num_bytes
        with self._locked():
            for path in self.folder.glob("*/*.tmp"):
                with suppress(OSError):
                    if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                        path.unlink()
            entries = sorted(self._entries())
            used = sum(size for _, size, _ in entries)
            for _, size, path in entries:
                if used <= limit:
                    break
                if path.stem not in self.own:
                    with suppress(OSError):
                        path.unlink(missing_ok=True)
                        used -= size
            self._note(used)
        return used

    # -- inside --------------------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Inside, no other process counts, writes or evicts, unless the disk has no locks."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            if self._lockable:
                self._lock.acquire(poll_interval=0.01)
        except (OSError, NotImplementedError):
            self._lockable = False
        try:
            yield
        finally:
            self._lock.release()

    def _leave_free(self) -> None:
        self._left_free = (free := self._free()) - int(DISK_SHARE * free)

    def _room(self, used: int) -> int:
        return max(0, min(self.limit - used, self._free() - (self._left_free or 0)))

    def _entries(self) -> list[tuple[float, int, Path]]:
        """Time of last use, bytes and path of each; one that another process deletes meanwhile is left out."""
        entries = []
        for path in self.folder.glob(f"*/*{SUFFIX}"):
            with suppress(FileNotFoundError):
                stat = path.stat()
                entries.append((stat.st_mtime, stat.st_size, path))
        return entries

    def _counted(self) -> int:
        """The bytes of all entries, under the lock; added up where nobody has counted, or was killed while writing the
        count."""
        for name in (COUNT, COPY):
            with suppress(OSError, ValueError):
                return int((self.folder / name).read_text())
        used = self.use().num_bytes
        with suppress(OSError):  # or each entry would be looked at for the next one too
            self._note(used)
        return used

    def _note(self, num_bytes: int) -> None:
        (self.folder / COPY).write_text(str(num_bytes))
        with suppress(OSError):
            (self.folder / COUNT).write_text(str(num_bytes))

    def _allowed(self, num_bytes: int) -> bool:
        free = shutil.disk_usage(self.folder).free
        return self._counted() + num_bytes <= self.limit and free - num_bytes >= (self._left_free or 0)

    def _free(self) -> int:
        """Bytes of its disk; the folder need not be there yet."""
        return shutil.disk_usage(next(p for p in (self.folder, *self.folder.parents) if p.exists())).free
