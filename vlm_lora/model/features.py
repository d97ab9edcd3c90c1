"""The frozen tower's output for each image, on disk: computed once per image, ever.

An entry is a safetensors file named by everything that decides its content: the image's bytes, the pixel limits and
the rest of the preprocessing, the tower's weights, the number format. Change one and the name is another one, so an
entry is never stale; it can only be missing. Files are written under a temporary name and renamed, so that processes
share the folder, and carry a checksum, so that a damaged one is computed again. The folder is kept below a limit by
deleting what was used longest ago; what it holds is counted in a file that is locked for each entry written, so that
all processes together keep the limit.
"""

import hashlib
import math
import os
import shutil
import tempfile
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vlm_lora.config import DEFAULT_CACHE_GB
from vlm_lora.data.example import ImageRef
from vlm_lora.data.images import content_hash, image_size, load_image
from vlm_lora.errors import DataError
from vlm_lora.model.backbone import Backbone

try:
    import fcntl
except ImportError:  # Windows: each process then keeps the limit by itself
    fcntl = None

CACHE_VARIABLE = "VLM_LORA_CACHE"
IN_MEMORY_BYTES = 512 * 2**20
"""Entries read or computed lately are kept in main memory up to this many bytes."""

DISK_SHARE = 0.9
"""Of what is free on the disk, so much may be filled."""

HEADER_BYTES = 400
"""More than an entry's file has beside its features."""

LAYOUT = "entry 2"  # goes into an entry's name: change it with what a file holds, and older ones are never opened

ABANDONED_SECONDS = 24 * 3600
"""A temporary file this old belongs to no running process."""


def cache_folder() -> Path:
    """``$VLM_LORA_CACHE``, else ``vlm-lora`` in the user's cache folder."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "vlm-lora"


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """One image as the tower sees it: ``features`` (patches, width) before the merger, ``grid_thw`` (3,)."""

    features: torch.Tensor
    grid_thw: torch.Tensor


@dataclass(frozen=True, slots=True)
class Pixels:
    """An image that is yet to go through the tower; ``name`` is its entry's, None for one that is never kept."""

    pixel_values: torch.Tensor
    grid_thw: torch.Tensor
    name: str | None


@dataclass(frozen=True, slots=True)
class CacheUse:
    entries: int
    num_bytes: int
    oldest: float | None  # seconds since the epoch, of the entry that was used longest ago
    newest: float | None


@dataclass(frozen=True, slots=True)
class Survey:
    """What a set of images asks of the cache: how many they are, copies counted once, their features' size on disk,
    what of it is missing there, and how much of that there is room for."""

    images: int
    num_bytes: int
    missing: int
    missing_bytes: int
    room: int


class FeatureCache:
    """Features by image, for one backbone.

    Args:
        folder: the cache folder; None keeps features in memory only.
        write: whether new features are kept on disk, as long as they fit; may be changed between calls.
        limit_gb: what the folder may hold, whoever fills it. Above it, what was used longest ago goes, but nothing of
            this object's own.
        warn: called with a sentence when the disk fails and the run goes on without it.
        in_memory: whether features that were read lately stay in main memory.

    Attributes:
        computed, read: how many images went through the tower, and how many were found, since the start.
        damaged: entries that failed their checksum and were computed again.
    """

    def __init__(
        self,
        backbone: Backbone,
        folder: Path | None,
        *,
        write: bool = True,
        limit_gb: float = DEFAULT_CACHE_GB,
        warn: Callable[[str], None] = lambda text: None,
        in_memory: bool = True,
    ):
        self.backbone = backbone
        self.in_memory = in_memory
        folder = None if backbone.tower_adapted else folder  # what an adapter changes is not kept
        self.folder = folder / "features" if folder else None
        self.write = write
        self.limit = round(limit_gb * 1e9)
        self.warn = warn
        self.computed = self.read = self.damaged = 0
        self._left_free: int | None = None  # bytes of the disk that stay free; None: nobody has looked
        self._parked = False  # the tower, but for an entry that is missing
        self._failing = False  # the disk is full, or read only
        self._memory: OrderedDict[str, ImageFeatures] = OrderedDict()
        self._memory_bytes = 0
        self._known: dict[ImageRef, tuple[str, tuple[int, int, int]]] = {}
        self._lock = threading.Lock()

    def get(self, images: Sequence[ImageRef | Image.Image]) -> list[ImageFeatures]:
        """Features of each image as its file is now, in order; those not found are computed and kept.

        One image at a time, so that an entry depends on its image alone and not on which others stood beside it.
        """
        return self.compute([self._fetch_as_it_is(image) for image in images])

    def fetch(self, images: Sequence[ImageRef | Image.Image]) -> list[ImageFeatures | Pixels]:
        """Of each image, its features or its pixels for `compute`. Needs no model: for a thread beside the training.

        Raises:
            DataError: a file is not the one any more that `grid` or `prepare` saw, or it cannot be read.
        """
        return [self._fetch(image) for image in images]

    def compute(self, fetched: Sequence[ImageFeatures | Pixels]) -> list[ImageFeatures]:
        """The features of each; whatever is still pixels goes through the tower."""
        found = [self._compute(item) if isinstance(item, Pixels) else item for item in fetched]
        if self._parked and any(isinstance(item, Pixels) for item in fetched):
            self._park(all(item.name and self._is_there(item.name) for item in fetched if isinstance(item, Pixels)))
        return found

    def survey(self, images: Iterable[ImageRef]) -> Survey:
        """Find out from file names and image headers what is there and what is missing; make room for the latter.

        Images that cannot be opened are left out: `prepare` says what is wrong with them.
        """
        sizes: dict[str, int] = {}
        for image in images:
            try:
                name, grid = self._identify(image)
            except DataError:
                continue
            sizes[name] = self.backbone.feature_bytes(grid)
        missing = [name for name in sizes if not self._is_there(name)]
        missing_bytes = sum(sizes[name] for name in missing)
        room = self._make_room(missing_bytes + HEADER_BYTES * len(missing))
        return Survey(len(sizes), sum(sizes.values()), len(missing), missing_bytes, room)

    def grid(self, image: ImageRef) -> torch.Tensor:
        """Its ``grid_thw`` ``(3,)``, from its header alone. Raises DataError where that cannot be read."""
        return torch.tensor(self._identify(image)[1])

    def prepare(self, image: ImageRef) -> torch.Tensor:
        """Its ``grid_thw`` ``(3,)``, once it is sure that it can be trained on.

        Features that are to be kept are on disk behind this. An image whose features are not is decoded to see that
        it is whole; it goes through the tower when its turn comes.

        Raises:
            DataError: the image cannot be used.
        """
        name, grid = self._identify(image)
        if not self._is_there(name):
            if self._fits(self.backbone.feature_bytes(grid)):
                self.compute([self._fetch(image)])
            else:
                load_image(image)
        return torch.tensor(grid)

    def patches(self, image: ImageRef) -> int:
        """How many the image has, before the 2x2 merge, from its header alone."""
        return math.prod(self._identify(image)[1])

    def complete(self, images: Iterable[ImageRef]) -> bool:
        """Whether all of these images can do without the tower."""
        return all(self._is_there(self._identify(image)[0]) for image in images)

    def park_tower(self, images: Iterable[ImageRef]) -> None:
        """Have the tower's weights out of the device's memory if all of these images can do without it.

        One that is missing later, damaged or evicted by another run, brings them back until it is computed; and for
        good if it cannot be kept.
        """
        self._park(self.complete(images))

    # -- inside --------------------------------------------------------------------------------------------------

    def _park(self, complete: bool) -> None:
        self._parked = complete
        if complete:
            self.backbone.park_tower()

    def _identify(self, image: ImageRef) -> tuple[str, tuple[int, int, int]]:
        """The name of its entry, and its grid, as they were when the file was first looked at."""
        if image not in self._known:
            self._known[image] = self._name_and_grid(image, image.read_bytes())
        return self._known[image]

    def _name_and_grid(self, image: ImageRef, data: bytes) -> tuple[str, tuple[int, int, int]]:
        key = f"{LAYOUT}:{content_hash(data)}:{self.backbone.tower_fingerprint}"
        grid = self.backbone.grid(*image_size(data, image.name))
        return hashlib.sha256(key.encode()).hexdigest(), grid

    def _fetch(self, image: ImageRef | Image.Image) -> ImageFeatures | Pixels:
        """What the image that was identified has; its file is read only if the cache has nothing."""
        if not isinstance(image, ImageRef):
            return self._pixels(image, None)
        name, _ = self._identify(image)
        if entry := self._find(name):
            return entry
        data = image.read_bytes()
        # The name must be that of the very bytes that are decoded, or another image's features would go by it.
        if self._name_and_grid(image, data)[0] != name:
            raise DataError(f"{image.name!r} has changed since it was first read; put it back, or start anew")
        return self._pixels(load_image(data, name=image.name), name)

    def _fetch_as_it_is(self, image: ImageRef | Image.Image) -> ImageFeatures | Pixels:
        if not isinstance(image, ImageRef):
            return self._pixels(image, None)
        data = image.read_bytes()
        identity = self._name_and_grid(image, data)
        self._known.setdefault(image, identity)
        return self._find(identity[0]) or self._pixels(load_image(data, name=image.name), identity[0])

    def _find(self, name: str) -> ImageFeatures | None:
        """The entry in memory or on disk."""
        with self._lock:
            if name in self._memory:
                self._memory.move_to_end(name)
                self.read += 1
                return self._memory[name]
        if entry := self._load(name):
            self.read += 1
            self._remember(name, entry)
        return entry

    def _pixels(self, image: Image.Image, name: str | None) -> Pixels:
        pixel_values, grid = self.backbone.preprocess([image])
        return Pixels(pixel_values, grid[0], name)

    def _compute(self, item: Pixels) -> ImageFeatures:
        if entry := self._memory.get(item.name):  # it was fetched twice before it was computed
            return entry
        self.computed += 1
        features = self.backbone.tower(item.pixel_values, item.grid_thw[None]).cpu()
        entry = ImageFeatures(features, item.grid_thw)
        if item.name:
            self._store(item.name, entry)
            self._remember(item.name, entry)
        return entry

    def _remember(self, name: str, entry: ImageFeatures) -> None:
        with self._lock:
            if not self.in_memory or name in self._memory:  # the other thread was faster
                return
            self._memory[name] = entry
            self._memory_bytes += entry.features.nbytes
            while self._memory_bytes > IN_MEMORY_BYTES and len(self._memory) > 1:
                _, dropped = self._memory.popitem(last=False)
                self._memory_bytes -= dropped.features.nbytes

    def _path(self, name: str) -> Path | None:
        return self.folder / name[:2] / f"{name}.safetensors" if self.folder else None

    def _is_there(self, name: str) -> bool:
        path = self._path(name)
        return path is not None and path.exists()

    def _load(self, name: str) -> ImageFeatures | None:
        path = self._path(name)
        if path is None:
            return None
        try:
            with safe_open(path, framework="pt") as entry:
                found = ImageFeatures(entry.get_tensor("features"), entry.get_tensor("grid_thw"))
                whole = (entry.metadata() or {}).get("crc32") == _checksum(name, found)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError):
            whole = False
        with suppress(OSError):  # a folder of somebody else's may be read only
            if whole:
                os.utime(path)  # used now, so the last to be evicted
            else:
                path.unlink(missing_ok=True)
        if not whole:
            self.damaged += 1
            self.warn(f"{path} is damaged; these features are computed again.")
            return None
        return found

    @property
    def _keeps(self) -> bool:
        """Whether new features are written at all."""
        return self.folder is not None and self.write and not self._failing

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A disk that is full or read only ends the keeping of features, and is told of, once."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            self._failing = True
            self.warn(f"no more features are kept in {self.folder}, the tower computes them anew: {error}")

    def _make_room(self, wanted: int) -> int:
        """Evict until ``wanted`` bytes fit, or nothing is left that is not of this run; the bytes that do."""
        room = 0
        if self._keeps:
            with self._writing():
                own = {name for name, _ in self._known.values()}
                used = evict(self.folder.parent, self.limit - wanted, keep=own)
                free = _free(self.folder)
                self._left_free = free - int(DISK_SHARE * free)
                room = max(0, min(self.limit - used, free - self._left_free))
        return room

    def _fits(self, num_bytes: int) -> bool:
        """Whether an entry with so many bytes of features may be written, unless another process is faster."""
        if self._left_free is None:
            self._make_room(0)
        fits = False
        if self._keeps:
            with self._writing(), _counted(self.folder) as count:
                fits = self._allowed(num_bytes + HEADER_BYTES, count)
        return fits

    def _allowed(self, num_bytes: int, count: TextIO) -> bool:
        within = _bytes_held(self.folder, count) + num_bytes <= self.limit
        return within and shutil.disk_usage(self.folder).free - num_bytes >= self._left_free

    def _store(self, name: str, entry: ImageFeatures) -> None:
        if not self._fits(entry.features.nbytes):
            return
        path, temporary, size = self._path(name), None, entry.features.nbytes + HEADER_BYTES
        # The lock is held while writing, which takes a moment where the tower takes many.
        with self._writing(), _counted(self.folder) as count:
            if path.exists() or not self._allowed(size, count):  # another process was faster
                return
            try:
                path.parent.mkdir(exist_ok=True)
                handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
                os.close(handle)
                tensors = {"features": entry.features.contiguous(), "grid_thw": entry.grid_thw}
                save_file(tensors, temporary, metadata={"crc32": _checksum(name, entry)})
                _note(count, _bytes_held(self.folder, count) + size)  # if it is killed here, too much is counted
                os.replace(temporary, path)
            finally:
                if temporary:
                    Path(temporary).unlink(missing_ok=True)


@contextmanager
def _counted(folder: Path) -> Iterator[TextIO]:
    """The file in which the folder's bytes are counted, open for `_bytes_held` and `_note`; no other process is here.

    The count may be too high, of entries that were deleted by hand or killed while written, until `evict` looks again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "count").open("a+") as count:
        if fcntl:
            with suppress(OSError):  # some network disks have no locks: each process then keeps the limit by itself
                fcntl.flock(count, fcntl.LOCK_EX)
        yield count


def _bytes_held(folder: Path, count: TextIO) -> int:
    count.seek(0)
    noted = count.read()
    return int(noted) if noted.isdigit() else sum(size for _, size, _ in _entries(folder.parent))


def _note(count: TextIO, num_bytes: int) -> None:
    count.truncate(0)
    count.write(str(num_bytes))
    count.flush()


def _checksum(name: str, entry: ImageFeatures) -> str:
    """Of all that an entry is: whose it is, both tensors' shape, number format and numbers."""
    features, grid = entry.features, entry.grid_thw
    told = f"{name} {features.dtype} {tuple(features.shape)} {grid.dtype} {grid.tolist()}"
    return str(zlib.crc32(features.contiguous().view(torch.uint8).numpy().data, zlib.crc32(told.encode())))


def _entries(folder: Path) -> list[tuple[float, int, Path]]:
    """Time of last use, bytes and path of each entry; one that another process deletes meanwhile is left out."""
    found = []
    for path in (folder / "features").glob("*/*.safetensors"):
        with suppress(FileNotFoundError):
            stat = path.stat()
            found.append((stat.st_mtime, stat.st_size, path))
    return found


def cache_use(folder: Path) -> CacheUse:
    """How many entries the cache folder holds, and how large."""
    entries = _entries(folder)
    times = [used for used, _, _ in entries]
    return CacheUse(
        len(entries), sum(size for _, size, _ in entries), min(times, default=None), max(times, default=None)
    )


def room_for(folder: Path, limit: int, wanted: int) -> int:
    """Bytes that a run which wants so many finds room for in a cache folder, if none of what is there is its own."""
    used = cache_use(folder).num_bytes
    left = min(used, max(0, limit - wanted))  # by `evict`
    return max(0, min(limit - left, int(DISK_SHARE * (_free(folder) + used - left))))


def found_again(num_bytes: int) -> float:
    """The share of images that main memory still holds when they come again in the next epoch, in another order, if the
    features of all are so many bytes: those between whose two turns fewer others came than it has room for."""
    share = min(1.0, IN_MEMORY_BYTES / max(1, num_bytes))
    return share + (1 - share) * math.log1p(-share) if share < 1 else 1.0


def _free(folder: Path) -> int:
    """Bytes of its disk; the folder need not be there yet."""
    return shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free


def evict(folder: Path, limit: int, keep: Collection[str] = ()) -> int:
    """Delete the entries used longest ago, but none named in ``keep``, until ``limit`` bytes are left; the bytes left.

    Any number of processes may do so at a time: a reader that finds its entry gone computes it again.
    """
    if not os.access(folder / "features", os.W_OK):  # not there, or read only: nothing can go
        return cache_use(folder).num_bytes
    with _counted(folder / "features") as count:
        for path in (folder / "features").glob("*/*.tmp"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()
        entries = sorted(_entries(folder))
        used = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if used <= limit:
                break
            if path.stem not in keep:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
                    used -= size
        _note(count, used)
    return used


def clear_cache(folder: Path) -> None:
    shutil.rmtree(folder / "features", ignore_errors=True)
