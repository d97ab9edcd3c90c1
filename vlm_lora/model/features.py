"""The frozen tower's output for each image, on disk: computed once per image, ever.

An entry is a safetensors file named by everything that decides its content: the image's bytes, the pixel limits and
the rest of the preprocessing, the tower's weights, the number format. Change one and the name is another one, so an
entry is never stale; it can only be missing. Files are written under a temporary name and renamed, so that processes
share the folder, and carry a checksum, so that a damaged one is computed again.
"""

import hashlib
import os
import shutil
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vlm_lora.data.example import ImageRef
from vlm_lora.data.images import content_hash, load_image
from vlm_lora.model.backbone import Backbone

CACHE_VARIABLE = "VLM_LORA_CACHE"
IN_MEMORY_BYTES = 512 * 2**20
"""Entries read or computed lately are kept in main memory up to this many bytes."""

CACHE_LIMIT_BYTES = 50 * 2**30
"""What the folder may hold; images beyond it are computed anew each time they are needed."""


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
class CacheUse:
    entries: int
    num_bytes: int
    oldest: float | None  # seconds since the epoch, of the least recently written entry
    newest: float | None


class FeatureCache:
    """Features by image, for one backbone.

    Args:
        folder: the cache folder; None keeps features in memory only.
        write: whether new features are kept on disk, as long as they fit (`CACHE_LIMIT_BYTES`).

    Attributes:
        computed, read: how many images went through the tower, and how many were found, since the start.
        damaged: entries that failed their checksum and were computed again.
    """

    def __init__(self, backbone: Backbone, folder: Path | None, *, write: bool = True):
        self.backbone = backbone
        self.folder = folder / "features" if folder else None
        self._room = CACHE_LIMIT_BYTES - cache_use(folder).num_bytes if folder and write else 0
        self.computed = self.read = self.damaged = 0
        self._memory: OrderedDict[str, ImageFeatures] = OrderedDict()
        self._memory_bytes = 0
        self._names: dict[ImageRef, str] = {}

    def get(self, images: Sequence[ImageRef | Image.Image]) -> list[ImageFeatures]:
        """Features of each image, in order; those not found are computed, one image at a time, and kept.

        One at a time, so that an entry depends on its image alone and not on which others stood beside it.
        """
        return [self._one(image) for image in images]

    # -- inside --------------------------------------------------------------------------------------------------

    def _one(self, image: ImageRef | Image.Image) -> ImageFeatures:
        if isinstance(image, Image.Image):
            return self._compute(image)
        if image not in self._names:
            data = image.read_bytes()
            key = f"{content_hash(data)}:{self.backbone.tower_fingerprint}"
            self._names[image] = hashlib.sha256(key.encode()).hexdigest()
        name = self._names[image]
        if name in self._memory:
            self._memory.move_to_end(name)
            self.read += 1
            return self._memory[name]
        entry = self._load(name)
        if entry is None:
            entry = self._compute(load_image(image))
            self._store(name, entry)
        else:
            self.read += 1
        self._remember(name, entry)
        return entry

    def _compute(self, image: Image.Image) -> ImageFeatures:
        self.computed += 1
        pixel_values, grid = self.backbone.preprocess([image])
        return ImageFeatures(self.backbone.tower(pixel_values, grid).cpu(), grid[0])

    def _remember(self, name: str, entry: ImageFeatures) -> None:
        self._memory[name] = entry
        self._memory_bytes += entry.features.nbytes
        while self._memory_bytes > IN_MEMORY_BYTES and len(self._memory) > 1:
            _, dropped = self._memory.popitem(last=False)
            self._memory_bytes -= dropped.features.nbytes

    def _path(self, name: str) -> Path | None:
        return self.folder / name[:2] / f"{name}.safetensors" if self.folder else None

    def _load(self, name: str) -> ImageFeatures | None:
        path = self._path(name)
        if path is None or not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as entry:
                features, grid = entry.get_tensor("features"), entry.get_tensor("grid_thw")
                checksum = (entry.metadata() or {}).get("crc32")
        except (SafetensorError, OSError):
            checksum = None
        if checksum is None or checksum != _checksum(features):
            self.damaged += 1
            path.unlink(missing_ok=True)
            return None
        return ImageFeatures(features, grid)

    def _store(self, name: str, entry: ImageFeatures) -> None:
        path = self._path(name)
        if path is None or entry.features.nbytes > self._room:
            return
        self._room -= entry.features.nbytes
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
        try:
            tensors = {"features": entry.features.contiguous(), "grid_thw": entry.grid_thw}
            save_file(tensors, temporary, metadata={"crc32": _checksum(entry.features)})
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)


def _checksum(features: torch.Tensor) -> str:
    return str(zlib.crc32(features.contiguous().view(torch.uint8).numpy().data))


def cache_use(folder: Path) -> CacheUse:
    """How many entries the cache folder holds, and how large."""
    stats = [path.stat() for path in (folder / "features").glob("*/*.safetensors")]
    times = [stat.st_mtime for stat in stats]
    return CacheUse(len(stats), sum(stat.st_size for stat in stats), min(times, default=None), max(times, default=None))


def clear_cache(folder: Path) -> None:
    shutil.rmtree(folder / "features", ignore_errors=True)
