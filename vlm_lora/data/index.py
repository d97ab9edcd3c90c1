"""What was found out of images and texts is kept on disk, so that a later run need not hash or tokenise them again.

Nothing in it can be stale: what is kept of an image goes by its file's name, size and time of change (or by the hash
of its bytes, where a reader gave that), what is kept of texts by the texts themselves. What is missing is found out
anew, and so is what is damaged. What is kept of rows, `readers.kept` says.
"""

import hashlib
import os
import tempfile
import threading
import time
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL
from filelock import FileLock, Timeout

import vlm_lora.data.images as images_module
from vlm_lora.config import cache_folder
from vlm_lora.data.example import ImageRef
from vlm_lora.data.images import content_hash, decoding_limit, image_size
from vlm_lora.errors import DataError

DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
"""What numpy raises for a file that is none of its archives, or is cut off, or whose checksum is wrong."""
UNUSED_SECONDS = 90 * 24 * 3600
"""An index that no run has opened for so long is deleted."""
LOCK_SECONDS = 2 * 3600
"""A process that makes an index is waited for so long; after it each makes its own, and none is damaged by that."""
WIDTH = 16  # bytes of a key


def index_folder() -> Path:
    """Where the indexes of all data are."""
    return cache_folder() / "index"


def key_of(*parts: object) -> bytes:
    """A short hash of what decides something."""
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=WIDTH).digest()


@contextmanager
def rewritten(path: Path) -> Iterator[BinaryIO]:
    """What is written inside is what the file holds, all of it or nothing; indexes that nobody uses are deleted. Raises
    OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    for other in (each for ending in ("npz", "rows", "tmp") for each in path.parent.glob(f"*.{ending}")):
        with suppress(OSError):
            if time.time() - other.stat().st_mtime > UNUSED_SECONDS:
                other.unlink()


@contextmanager
def locked(path: Path | None) -> Iterator[None]:
    """Inside, no other process makes this index; where the disk has no locks, each does for itself."""
    lock = None
    with suppress(OSError, NotImplementedError, Timeout):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_suffix(".lock"), timeout=LOCK_SECONDS)
            lock.acquire(poll_interval=0.05)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


class Table:
    """Rows of numbers by key, in a file that is always whole: an npz archive, whose parts have checksums.

    Args:
        path: None keeps nothing.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.columns: dict[str, np.ndarray] = {}
        self._places: dict[bytes, int] = {}

    def load(self) -> None:
        """Read what is there; a file that is damaged holds nothing."""
        self.columns, self._places = {}, {}
        if self.path is None:
            return
        with suppress(*DAMAGE):
            with np.load(self.path, allow_pickle=False) as archive:
                columns = dict(archive)
            keys = columns.pop("keys").tobytes()
            places = {keys[start : start + WIDTH]: start // WIDTH for start in range(0, len(keys), WIDTH)}
            self.columns, self._places = columns, places
            os.utime(self.path)

    def find(self, key: bytes | None) -> int | None:
        """The row of this key."""
        return None if key is None else self._places.get(key)

    def save(self, keys: bytes, columns: dict[str, np.ndarray]) -> None:
        """Have the file hold these rows, and delete indexes that nobody uses. Raises OSError."""
        if self.path is None:
            return
        with rewritten(self.path) as file:
            np.savez(file, allow_pickle=False, keys=np.frombuffer(keys, dtype=np.uint8), **columns)


class Looks:
    """What one look at each image's file showed: the hash of its bytes, and its size, from its header.

    Args:
        kept: a name of the data set, under which it is kept on disk; None keeps it for this process alone.
        warn: called with a sentence when the disk fails and nothing is kept.
    """

    def __init__(self, kept: object = None, warn: Callable[[str], None] = lambda text: None):
        code = Path(images_module.__file__).read_bytes()  # what decides a size and what is whole
        name = key_of(kept, decoding_limit(), PIL.__version__, code).hex()
        self.table = Table(index_folder() / f"images-{name}.npz" if kept is not None else None)
        self.warn = warn
        self.num_read = 0
        """How many images' files were read."""
        self._places: dict[bytes, int] = {}  # by what an image is: no ImageRef is kept
        self._keys, self._hashes = bytearray(), bytearray()
        self._sizes, self._whole = array("i"), bytearray()
        self._lock = threading.Lock()

    def sha256(self, image: ImageRef) -> str:
        """Of its bytes, hex. Raises DataError where it cannot be read."""
        at = 32 * self._place(image)
        return self._hashes[at : at + 32].hex()

    def size(self, image: ImageRef) -> tuple[int, int]:
        """Width and height as `image_size` gives them. Raises DataError as that does."""
        at = 2 * self._place(image)
        width, height = self._sizes[at : at + 2]
        return (width, height) if width else image_size(image.read_bytes(), image.name)

    def is_whole(self, image: ImageRef) -> bool:
        """Whether it was decoded without a fault, then or ever."""
        return bool(self._whole[self._place(image)])

    def note_whole(self, image: ImageRef) -> None:
        self._whole[self._place(image)] = 1

    def look_at_all(
        self, images: Iterable[ImageRef], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Look at those the index does not have, in threads. What is wrong with one is raised when it is asked for.

        One process at a time: the others find what it found.
        """
        missing = self._take(images)
        if not missing:
            return
        with locked(self.table.path):
            missing = self._take(missing)
            with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as threads:
                for start in range(0, len(missing), 256):
                    some = missing[start : start + 256]
                    for image, look in zip(some, threads.map(_look_or_none, some), strict=True):
                        self.num_read += 1
                        if look:
                            self._add(image, *look)
                    progress(start + len(some), len(missing))
            if missing:
                self.save()

    def save(self) -> None:
        """Keep what is known for later runs, beside what other processes have found of the same images."""
        keys, whole = bytes(self._keys), np.frombuffer(bytes(self._whole), dtype=np.uint8).copy()
        hashes = np.frombuffer(bytes(self._hashes), dtype=np.uint8).reshape(-1, 32)
        sizes = np.array(self._sizes, dtype=np.int32).reshape(-1, 2)
        self.table.load()
        for i, start in enumerate(range(0, len(keys), WIDTH)):
            if (found := self.table.find(keys[start : start + WIDTH])) is not None:
                whole[i] |= self.table.columns["whole"][found]
        self.table.columns, self.table._places = {}, {}
        # Of one that has no key or no size nothing is kept: it is looked at again
        good = (sizes[:, 0] > 0) & np.frombuffer(keys, dtype=np.uint8).reshape(-1, WIDTH).any(axis=1)
        kept = np.frombuffer(keys, dtype=np.uint8).reshape(-1, WIDTH)[good].tobytes()
        try:
            self.table.save(kept, {"hashes": hashes[good], "sizes": sizes[good], "whole": whole[good]})
        except OSError as error:
            self.warn(f"what was found out of the data is not kept for later runs: {error}")

    # -- inside --------------------------------------------------------------------------------------------------

    def _place(self, image: ImageRef) -> int:
        if (place := self._places.get(_name(image))) is None:
            self._add(image, *_look(image))
            self.num_read += 1
            place = self._places[_name(image)]
        return place

    def _take(self, images: Iterable[ImageRef]) -> list[ImageRef]:
        """Take over from the index what it has of these; those that it does not have, each once."""
        self.table.load()
        columns, missing = self.table.columns, {}
        for image in images:
            name = _name(image)
            if name in self._places or name in missing:
                continue
            if (at := self.table.find(key := _key(image))) is None:
                missing[name] = image
            else:
                look = columns["hashes"][at].tobytes(), columns["sizes"][at].tolist(), int(columns["whole"][at])
                self._add(image, key, *look)
        self.table.columns, self.table._places = {}, {}
        return list(missing.values())

    def _add(self, image: ImageRef, key: bytes | None, sha256: bytes, size: Sequence[int], whole: int = 0) -> None:
        with self._lock:  # the next step is fetched in a thread
            place = len(self._whole)
            self._keys += key or bytes(WIDTH)
            self._hashes += sha256
            self._sizes.extend(size)
            self._whole.append(whole)
            self._places[_name(image)] = place


def _name(image: ImageRef) -> bytes:
    """What it goes by in one process: where it is, and what its reader saw of it."""
    return key_of(str(image.path), image.size, image.sha256, image.embedded)


def _key(image: ImageRef) -> bytes | None:
    """What an image is known by: where a reader has its hash, that; else its file as it is now, if there is one."""
    if image.sha256:
        return key_of(image.sha256)
    with suppress(OSError, ValueError):
        status = os.stat(image.path)
        return key_of(str(image.path), status.st_size, status.st_mtime_ns)
    return None


def _look(image: ImageRef) -> tuple[bytes | None, bytes, tuple[int, int]]:
    """Its key, hash and size, (0, 0) where its header cannot be read. Raises DataError where its bytes cannot."""
    key = _key(image)  # before its bytes, which may change meanwhile
    data, size = image.read_bytes(), (0, 0)
    with suppress(DataError):
        size = image_size(data, image.name)
    return key, bytes.fromhex(image.sha256 or content_hash(data)), size


def _look_or_none(image: ImageRef) -> tuple[bytes | None, bytes, tuple[int, int]] | None:
    try:
        return _look(image)
    except DataError:  # raised again where the image is asked for
        return None
