"""What the frozen tower saw in each image: computed once per image, ever, and kept on disk and in memory.

An entry is a safetensors file named by everything that decides its content: the image's bytes, the pixel limits and
the rest of the preprocessing, the tower's weights, the number format. Change one and the name is another one, so an
entry is never stale; it can only be missing. It carries a checksum, so that a damaged one is computed again.
"""

import hashlib
import math
import threading
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vlm_lora.config import DEFAULT_CACHE_GB
from vlm_lora.data.example import Example, ImageRef
from vlm_lora.data.images import content_hash, load_image
from vlm_lora.data.index import Looks
from vlm_lora.errors import DataError
from vlm_lora.model.backbone import Backbone
from vlm_lora.model.preprocess import Pixels
from vlm_lora.model.store import Store

T = TypeVar("T")
IN_MEMORY_BYTES = 512 * 2**20
"""Entries read or computed lately are kept in main memory up to this many bytes."""

SEVERAL_AT_ONCE, PATCHES_AT_ONCE = ("cuda",), 16384
"""Devices on which several images together take the tower less time than one after the other, and how many patches: 16
images of 448 x 448."""

HEADER_BYTES = 400
"""More than an entry's file has beside its features."""

LAYOUT = "entry 2"  # goes into an entry's name: change it with what a file holds, and older ones are never opened


def store_in(folder: Path, limit_gb: float = DEFAULT_CACHE_GB) -> Store:
    """Where a cache folder keeps its entries."""
    return Store(folder / "features", round(limit_gb * 1e9))


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """One image as the tower sees it: ``values`` (patches, width) before the merger, ``grid_thw`` (3,)."""

    values: torch.Tensor
    grid_thw: torch.Tensor


@dataclass(frozen=True, slots=True)
class ImagePixels:
    """One image that is yet to go through the tower: ``values`` (patches, 3 * 2 * patch * patch), ``grid_thw`` (3,);
    ``name`` is its entry's, None for one that is never kept."""

    values: torch.Tensor
    grid_thw: torch.Tensor
    name: str | None


ImageEntry = ImageFeatures | ImagePixels
"""What a cache gives of an image: features; or pixels, where an adapter has changed the tower."""


def together(images: Sequence[ImageEntry], device: torch.device) -> torch.Tensor | Pixels | None:
    """These images as `Backbone.forward` takes them, on the device; None if there are none."""
    if not images:
        return None
    values = torch.cat([image.values.to(device, non_blocking=True) for image in images])
    if isinstance(images[0], ImagePixels):
        return Pixels(values, torch.stack([image.grid_thw for image in images]))
    return values


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
    """Features by image, for one backbone. Where an adapter sits in its tower, pixels instead, and nothing on disk.

    Args:
        folder: the cache folder; None keeps features in memory only.
        write: whether new features are kept on disk, as long as they fit; may be changed between calls.
        limit_gb: what the folder may hold, whoever fills it. Above it, what was used longest ago goes, but nothing of
            this object's own.
        warn: called with a sentence when the disk fails and the run goes on without it.
        in_memory: whether features that were read lately stay in main memory.
        looks: what is known of images without reading them.
        several: whether a GPU takes several images through the tower at once, in less time. By rounding, what one gives
            then depends on the others, so it takes one at a time where ``write`` has features kept on disk.

    Attributes:
        computed, read: how many images went through the tower, and how many were in the cache, since the start.
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
        looks: Looks | None = None,
        several: bool = False,
    ):  # arguments: what it is for, where and how much it keeps, what is known already, how it computes
        self.backbone = backbone
        self.live = backbone.tower_adapted
        self.store = store_in(folder, limit_gb) if folder and not self.live else None
        self.write = write
        self.warn = warn
        self.computed = self.read = self.damaged = 0
        self._left_out: set[str] = set()  # names of entries for which there is no room
        self._only: set[str] | None = None  # names of the only entries that are kept on disk
        self._parked = False  # the tower, but for an entry that is missing
        self._failing = False  # the disk is full, or read only
        self._memory = _Recent(IN_MEMORY_BYTES if in_memory else 0)
        self._looks = looks or Looks()
        self._several = several and not write and backbone.device.type in SEVERAL_AT_ONCE and not self.live

    @property
    def folder(self) -> Path | None:
        return self.store.folder if self.store else None

    def get(self, images: Sequence[ImageRef | Image.Image]) -> list[ImageEntry]:
        """Features of each image as its file is now, in order; those not in the cache are computed and kept.

        One image at a time, so that an entry depends on its image alone and not on which others stood beside it.
        """
        return self.compute(list(map(self.look, images)))

    def fetch(self, images: Sequence[ImageRef | Image.Image]) -> list[ImageEntry]:
        """Of each image, its features or its pixels for `compute`. Needs no model: for a thread beside the training.

        Raises:
            DataError: a file is not the one any more that `grid` or `prepare` saw, or it cannot be read.
        """
        return [self._fetch(image) for image in images]

    def look(self, image: ImageRef | Image.Image) -> ImageEntry:
        """The features of an image as its file is now, if they are there, or else its pixels for `compute`."""
        return self._fetch(image, as_it_is=True)

    def compute(self, fetched: Sequence[ImageEntry]) -> list[ImageEntry]:
        """The features of each; whatever is still pixels goes through the tower, unless that is done live."""
        if self._several:
            return self._compute_several(fetched)
        seen = [self._compute(image) if isinstance(image, ImagePixels) else image for image in fetched]
        computed = [image for image in fetched if isinstance(image, ImagePixels)]
        if self._parked and computed:
            self._park(all(image.name is not None and self._is_there(image.name) for image in computed))
        return seen

    def survey(self, *groups: Iterable[ImageRef], evict: bool = True) -> Survey:
        """Find out from file names and image headers what is there and what is missing, and make room for the latter.

        Where not all fit, the first group comes before the next, and of a group those are kept whose names, which are
        hashes of all that an entry is made of, come first: so any run on these images, in whatever order, keeps and
        finds the same ones.

        Images that cannot be opened are left out: `prepare` says what is wrong with them.

        Args:
            evict: whether others' entries go; False where another process of this run has seen to it.
        """
        sizes: dict[str, int] = {}
        order: list[str] = []
        for images in groups:
            found = self._sizes(images)
            order += sorted(found.keys() - sizes.keys())
            sizes |= found
        missing = [name for name in order if not self._is_there(name)]
        missing_bytes = sum(sizes[name] for name in missing)
        needed = list(accumulate(sizes[name] + HEADER_BYTES for name in missing))
        wanted = needed[-1] if needed else 0
        room = self._on_disk(lambda store: store.make_room(wanted) if evict else store.room(), 0)
        self._left_out = set(missing[bisect_right(needed, room) :]) if self.write else set()
        return Survey(len(sizes), sum(sizes.values()), len(missing), missing_bytes, room)

    def share_kept(self, images: Iterable[ImageRef], expected: bool) -> float:
        """The share of these images' features that is on disk, or is ``expected`` to be once all were seen; 1 for
        none."""
        sizes = self._sizes(images)
        missing = {name: size for name, size in sizes.items() if not self._is_there(name)}
        if expected and self.store and self.write:
            missing = {name: size for name, size in missing.items() if not self._is_kept(name)}
        return 1 - sum(missing.values()) / max(1, sum(sizes.values()))

    def grid(self, image: ImageRef) -> torch.Tensor:
        """Its ``grid_thw`` ``(3,)``, from its header alone. Raises DataError where that cannot be read."""
        return torch.tensor(self._identify(image)[1])

    def grids(self, example: Example) -> torch.Tensor:
        """``(num_images, 3)``, of all its images."""
        grids = [self.grid(image) for image in example.images]
        return torch.stack(grids) if grids else torch.zeros(0, 3, dtype=torch.long)

    def keep_only(self, images: Iterable[ImageRef]) -> None:
        """Have new features of no other images kept on disk."""
        self._only = set(self._sizes(images))

    def blank(self, image: ImageRef) -> ImagePixels:
        """An empty picture of the image's size, in place of one whose pixels cannot be had."""
        return self._pixels(Image.new("RGB", self._looks.size(image)), None)

    def prepare(self, image: ImageRef) -> torch.Tensor:
        """Its ``grid_thw`` ``(3,)``, once it is sure that it can be trained on.

        Features that are to be kept are on disk after this. An image whose features are not is decoded to see that it
        is whole; it goes through the tower when its turn comes.

        Raises:
            DataError: the image cannot be used.
        """
        name, grid = self._identify(image)
        if not self._is_there(name):
            size = self.backbone.feature_bytes(grid) + HEADER_BYTES
            if name not in self._left_out and self._on_disk(lambda store: store.fits(size), False):
                self.compute([self._fetch(image)])
            elif not self._looks.is_whole(image):
                load_image(self._same_bytes(image), name=image.name)
                self._looks.note_whole(image)
        return torch.tensor(grid)

    def keep_looks(self) -> None:
        """Have later runs know which images are whole."""
        self._looks.save()

    def patches(self, image: ImageRef) -> int:
        """How many the image has, before the 2x2 merge, from its header alone."""
        return math.prod(self._identify(image)[1])

    def content_hash(self, image: ImageRef) -> str:
        """Of the image's bytes, in hex, as they were when first looked at."""
        return self._looks.sha256(image)

    def complete(self, images: Iterable[ImageRef]) -> bool:
        """Whether all of these images can do without the tower."""
        return all(self._is_there(self._identify(image)[0]) for image in images)

    def fingerprint(self, images: Iterable[ImageRef]) -> str:
        """Of the images' bytes, in whatever order, as they were when first looked at."""
        return hashlib.sha256("".join(sorted({self._identify(image)[0] for image in images})).encode()).hexdigest()

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

    def _sizes(self, images: Iterable[ImageRef]) -> dict[str, int]:
        """Bytes of the features of those that can be opened, by the name of their entry."""
        sizes = {}
        for image in images:
            with suppress(DataError):
                name, grid = self._identify(image)
                sizes[name] = self.backbone.feature_bytes(grid)
        return sizes

    def _identify(self, image: ImageRef) -> tuple[str, tuple[int, int, int]]:
        """The name of its entry, and its grid, as they were when the file was first looked at."""
        return self._named(self._looks.sha256(image)), self.backbone.grid(*self._looks.size(image))

    def _named(self, content: str) -> str:
        """The name of the entry of an image with this hash; it is not evicted from here on."""
        key = f"{LAYOUT}:{content}:{self.backbone.tower_fingerprint}"
        name = hashlib.sha256(key.encode()).hexdigest()
        if self.store:
            self.store.own.add(name)
        return name

    def _same_bytes(self, image: ImageRef) -> bytes:
        """Its bytes, if they are those that were looked at: or another image's features would go by its name."""
        data = image.read_bytes()
        if content_hash(data) != self._looks.sha256(image):
            raise DataError(f"{image.name!r} has changed since it was first read; put it back, or start again")
        return data

    def _fetch(self, image: ImageRef | Image.Image, as_it_is: bool = False) -> ImageEntry:
        """What is there of the image that was identified, or of the file ``as_it_is`` now; its pixels, if nothing is.
        A file that was identified is read only then."""
        if not isinstance(image, ImageRef):
            return self._pixels(image, None)
        data = image.read_bytes() if as_it_is else None
        name = self._identify(image)[0] if data is None else self._named(content_hash(data))
        if entry := self._find(name):
            return entry
        data = self._same_bytes(image) if data is None else data
        return self._pixels(load_image(data, name=image.name), name)

    def _find(self, name: str) -> ImageEntry | None:
        """The entry in memory or on disk."""
        entry = self._memory.get(name)
        if entry is None and (entry := self._load(name)):
            self._memory.put(name, entry)
        if entry is not None:
            self.read += 1
        return entry

    def _pixels(self, image: Image.Image, name: str | None) -> ImagePixels:
        pixel_values, grid_thw = self.backbone.preprocess([image])
        return ImagePixels(pixel_values, grid_thw[0], name)

    def _compute_several(self, entries: Sequence[ImageEntry]) -> list[ImageEntry]:
        seen, left = list(entries), [(i, entry) for i, entry in enumerate(entries) if isinstance(entry, ImagePixels)]
        while left:
            number = max(1, bisect_right(list(accumulate(len(each.values) for _, each in left)), PATCHES_AT_ONCE))
            (places, some), left = zip(*left[:number], strict=True), left[number:]
            grids = torch.stack([each.grid_thw for each in some])
            values = self.backbone.tower(torch.cat([each.values for each in some]), grids).cpu()
            parts = values.split([len(each.values) for each in some])
            for i, each, part in zip(places, some, parts, strict=True):
                seen[i] = ImageFeatures(part.clone(), each.grid_thw)  # or one that stays keeps all of them
                if each.name:
                    self._memory.put(each.name, seen[i])
            self.computed += number
        return seen

    def _compute(self, image: ImagePixels) -> ImageEntry:
        if image.name and (entry := self._memory.get(image.name)):  # it was fetched twice before it was computed
            return entry
        self.computed += 1
        if self.live:
            entry = image
        else:
            features = self.backbone.tower(image.values, image.grid_thw[None])
            entry = ImageFeatures(features.cpu(), image.grid_thw)
            if (name := image.name) and self._is_kept(name):
                size, write = features.nbytes + HEADER_BYTES, partial(_write, name, entry)
                self._on_disk(lambda store: store.put(name, size, write), None)
        if image.name:
            self._memory.put(image.name, entry)
        return entry

    def _is_kept(self, name: str) -> bool:
        return name not in self._left_out and (self._only is None or name in self._only)

    def _is_there(self, name: str) -> bool:
        return self.store is not None and name in self.store

    def _load(self, name: str) -> ImageFeatures | None:
        """The entry on disk. A damaged one is deleted, with a warning."""
        if self.store is None:
            return None
        try:
            entry = self.store.get(name, partial(_read, name))
        except FileNotFoundError:
            return None
        if entry is None:
            self.damaged += 1
            self.warn(f"{self.store.path(name)} is damaged; these features are computed again.")
        return entry

    def _on_disk(self, work: Callable[[Store], T], otherwise: T) -> T:
        """What ``work`` gives where new features are kept. A disk that is full or read only ends that, with a
        warning."""
        if self.store is None or not self.write or self._failing:
            return otherwise
        try:
            return work(self.store)
        except (OSError, SafetensorError) as error:
            self._failing = True
            self.warn(f"no more features are kept in {self.folder}; the tower computes them each time: {error}")
            return otherwise


class _Recent:
    """The entries used last, up to ``limit`` bytes; for several threads."""

    def __init__(self, limit: int):
        self.limit = limit
        self._entries: OrderedDict[str, ImageEntry] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def get(self, name: str) -> ImageEntry | None:
        with self._lock:
            if name in self._entries:
                self._entries.move_to_end(name)
            return self._entries.get(name)

    def put(self, name: str, entry: ImageEntry) -> None:
        with self._lock:
            if name in self._entries:  # another thread was faster
                return
            self._entries[name] = entry
            self._num_bytes += entry.values.nbytes
            while self._num_bytes > self.limit:
                _, dropped = self._entries.popitem(last=False)
                self._num_bytes -= dropped.values.nbytes


def found_again(num_bytes: int) -> float:
    """The expected share of images that are still in main memory when they return, each epoch in another order, if
    the features of all take so many bytes: those between whose two turns fewer others came than there is room for."""
    share = min(1.0, IN_MEMORY_BYTES / max(1, num_bytes))
    return share + (1 - share) * math.log1p(-share) if share < 1 else 1.0


def _read(name: str, path: Path) -> ImageFeatures | None:
    """The entry in a file; None if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            entry = ImageFeatures(file.get_tensor("features"), file.get_tensor("grid_thw"))
            return entry if (file.metadata() or {}).get("crc32") == _checksum(name, entry) else None
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError):
        return None


def _write(name: str, entry: ImageFeatures, path: Path) -> None:
    tensors = {"features": entry.values.contiguous(), "grid_thw": entry.grid_thw}
    save_file(tensors, path, metadata={"crc32": _checksum(name, entry)})


def _checksum(name: str, entry: ImageFeatures) -> str:
    """Of all that an entry is: whose it is, both tensors' shape, number format and numbers."""
    values, grid = entry.values, entry.grid_thw
    header = f"{name} {values.dtype} {tuple(values.shape)} {grid.dtype} {grid.tolist()}"
    return str(crc32(values, zlib.crc32(header.encode())))


def crc32(values: torch.Tensor, start: int = 0) -> int:
    """A checksum of a tensor's numbers, on top of another one."""
    return zlib.crc32(values.contiguous().view(torch.uint8).numpy().data, start)
