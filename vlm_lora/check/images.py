"""One look at each image of a data set, and which of them look alike."""

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vlm_lora.data.example import ImageRef
from vlm_lora.data.images import SEVERAL_FRAMES, content_hash, load_image
from vlm_lora.errors import DataError

NEAR_BITS = 4
"""Two images are near-duplicates where at most N of the 64 bits of their hashes differ, and"""
NEAR_COLOUR = 10.0
"""their 9x8 miniatures differ by at most this, of 255, on average: by the hash alone flat images are one."""
NEAR_GREY = 2.0
"""A place counts as darker than its right neighbour where it is so by more than this, of 255: flat ground is noisy."""
MAX_PAIRS = 100_000
"""The search for near-duplicates ends with N pairs: pictures of one plain colour all look alike."""
SAMPLE = (288, 256)
"""Width and height, in pixels, of what is looked at of a picture in the search for near-duplicates."""
THUMBNAIL = 160
"""Longest side of a picture on the contact sheet, in pixels."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look at one image shows: either ``error``, or all the rest."""

    ref: ImageRef
    error: str | None = None
    size: tuple[int, int] = (0, 0)
    """Width and height, upright."""
    sha256: str = ""
    miniature: bytes = b""
    """9x8 RGB."""
    thumbnail: bytes = b""
    """JPEG, where one was asked for."""
    several_frames: bool = False


def look_at_all(refs: Sequence[ImageRef], shown: set[ImageRef]) -> Iterator[Seen]:
    """Every image, in order, those of `shown` with a thumbnail; in threads, as Pillow decodes without Python's lock."""
    workers = num_workers()
    with ThreadPoolExecutor(workers) as pool:
        # A part at a time, so that a stop (Ctrl-C) need not wait for all of the rest
        for start in range(0, len(refs), 64 * workers):
            part = refs[start : start + 64 * workers]
            # To hand one over costs as much as a thumbnail
            chunks = [part[at : at + 8] for at in range(0, len(part), 8)]
            for looks in pool.map(lambda chunk: [look_at(ref, thumbnail=ref in shown) for ref in chunk], chunks):
                yield from looks


def num_workers() -> int:
    """Threads that decode images."""
    return min(32, os.cpu_count() or 1)


def look_at(ref: ImageRef, *, thumbnail: bool = False) -> Seen:
    """One image, read and decoded. Never raises for a bad one: `Seen.error` says what is wrong."""
    try:
        data = ref.read_bytes()
        image = load_image(data, name=ref.name)
    except DataError as error:
        return Seen(ref, str(error))
    # Of a large picture a thousand pixels do for each of the 72 places: to look at all costs a fifth of decoding
    sample = image.resize(SAMPLE, Image.Resampling.NEAREST) if min(image.size) > max(SAMPLE) else image
    miniature = sample.resize((9, 8), Image.Resampling.BOX, reducing_gap=1.0).tobytes()
    small = b""
    if thumbnail:
        small_image, out = image.copy(), io.BytesIO()
        small_image.thumbnail((THUMBNAIL, THUMBNAIL))
        small_image.save(out, "JPEG", quality=80)
        small = out.getvalue()
    frames = SEVERAL_FRAMES in image.info
    return Seen(ref, None, image.size, ref.sha256 or content_hash(data), miniature, small, frames)


def near_duplicates(looks: Sequence[Seen]) -> tuple[list[tuple[Seen, Seen]], bool]:
    """Pairs that look alike but differ in their bytes: a picture saved again, scaled, a little brighter.

    And whether the search ended at MAX_PAIRS.
    """
    if len(looks) < 2:
        return [], False
    minis = np.frombuffer(b"".join(look.miniature for look in looks), np.uint8).reshape(len(looks), 8, 9, 3)
    grey = minis @ np.array([0.299, 0.587, 0.114], np.float32)
    # dHash: whether each of 8x8 places is darker than its right neighbour; scale and contrast do not matter
    darker = (grey[:, :, :-1] + NEAR_GREY < grey[:, :, 1:]).reshape(len(looks), 64)
    bits = np.packbits(darker, axis=1).view(np.uint64)[:, 0]
    flat = minis.reshape(len(looks), -1).astype(np.int16)
    pairs: set[tuple[int, int]] = set()
    for block, rest in _with_equal_bits(bits):
        close = np.bitwise_count(bits[block][:, None] ^ bits[rest][None]) <= NEAR_BITS
        first, second = np.nonzero(np.triu(close, k=1))
        first, second = block[first], rest[second]
        for at in range(0, len(first), 65536):  # in pieces: all of a folder of one colour may be close
            a, b = first[at : at + 65536], second[at : at + 65536]
            alike = np.abs(flat[a] - flat[b]).mean(axis=1) <= NEAR_COLOUR
            pairs.update(zip(a[alike].tolist(), b[alike].tolist(), strict=True))
        if len(pairs) >= MAX_PAIRS:
            break
    near = [(looks[a], looks[b]) for a, b in sorted(pairs)]
    return [(a, b) for a, b in near if a.sha256 != b.sha256], len(pairs) >= MAX_PAIRS


def _with_equal_bits(bits: Any) -> Iterator[tuple[Any, Any]]:
    """Indices of hashes to compare, not every one with every other: N of them, and those N and all that follow.

    Both are ascending, and of hashes that agree in a fifth of their bits: any two near ones do, in some fifth.
    """
    for shift in range(0, 64, 13):  # NEAR_BITS + 1 bands
        band = (bits >> np.uint64(shift)) & np.uint64((1 << 13) - 1)
        order = np.argsort(band, kind="stable")
        borders = np.concatenate([[0], np.nonzero(np.diff(band[order]))[0] + 1, [len(order)]])
        for which in np.nonzero(np.diff(borders) > 1)[0]:
            group = order[borders[which] : borders[which + 1]]
            for start in range(0, len(group), 256):
                yield group[start : start + 256], group[start:]
