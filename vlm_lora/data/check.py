"""What is in this data, and what is wrong with it: every image is decoded once.

Knows neither tokens nor training: what an image costs in tokens is `model.tokens`'.
"""

import io
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from PIL import Image

from vlm_lora.data.example import Example, ImageRef
from vlm_lora.data.images import SEVERAL_FRAMES, content_hash, load_image
from vlm_lora.data.languages import languages, scripts
from vlm_lora.data.readers import BadRow, Dataset, bad_rows
from vlm_lora.data.split import split_examples
from vlm_lora.data.texts import clean_text
from vlm_lora.errors import DataError

NEAR_BITS = 4
"""Two images are near-duplicates where at most so many of the 64 bits of their hashes differ, and"""
NEAR_GREY = 2.0
"""A place counts as darker than its right neighbour where it is so by more than this, of 255: flat ground is noisy."""
NEAR_COLOUR = 10.0
"""their 9x8 miniatures differ by at most this, of 255, on average: by the hash alone flat images are one."""
MAX_PAIRS = 100_000
"""The search for near-duplicates ends with so many pairs: pictures of one plain colour all look alike."""
SAMPLE = (288, 256)
"""Width and height, in pixels, of what is looked at of a picture in the search for near-duplicates."""
LISTED = 10
"""So many of a kind are listed; the count is always that of all."""
THUMBNAIL = 160
"""Longest side of a picture on the contact sheet, in pixels."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look at one image found: either ``error``, or all the rest."""

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


@dataclass(frozen=True, slots=True)
class Check:
    """All that was found. `examples` and `held_out` are those that can be used: no image of theirs is bad."""

    dataset: Dataset
    examples: tuple[Example, ...]
    held_out: tuple[Example, ...]
    """Of the second data set, where there is one."""
    seen: dict[ImageRef, Seen]
    bad: tuple[BadRow, ...]
    duplicates: tuple[tuple[str, ...], ...]
    """Names of images with the same bytes."""
    near: tuple[tuple[str, str], ...]
    """Pairs of names."""
    near_cut: bool
    """Whether the search for `near`, and so for `leaks`, ended at MAX_PAIRS."""
    leaks: tuple[tuple[str, str], ...]
    """Pairs of images that are one or look alike, the first in training and the second held out."""
    cleaned: Counter
    """How many texts `clean_text` changes, by the reason; under "texts" how many in all."""

    def facts(self) -> dict[str, Any]:
        """What `vlm-lora check --json` prints, but for the tokens."""
        sizes = sorted((s.size for s in self.seen.values() if not s.error), key=lambda size: math.prod(size))
        said = [d for e in self.examples for d in e.dialogues]
        repeated = Counter(turn.assistant for d in said for turn in d.turns)
        return {
            "format": self.dataset.format,
            "columns": self.dataset.note,
            "unread": self.dataset.unread,
            "examples": len(self.examples),
            "images": len(sizes),
            "answers": len(said),
            "sources": self.dataset.parts,
            "held_out": {"examples": len(self.held_out), "answers": sum(len(e.dialogues) for e in self.held_out)},
            "bad": [asdict(row) for row in self.bad],
            "answers_per_example": _spread(len(e.dialogues) for e in self.examples),
            "image_sizes": {"smallest": sizes[0], "median": sizes[len(sizes) // 2], "largest": sizes[-1]}
            if sizes
            else {},
            "several_frames": sum(look.several_frames for look in self.seen.values()),
            "duplicates": {"count": len(self.duplicates), "first": self.duplicates[:LISTED]},
            "near_duplicates": {"count": len(self.near), "first": self.near[:LISTED], "cut": self.near_cut},
            "leaks": {"count": len(self.leaks), "first": self.leaks[:LISTED]},
            "repeated": [[text, times] for text, times in repeated.most_common(LISTED) if times > 1],
            "scripts": scripts(turn.assistant for d in said for turn in d.turns),
            "languages": languages(turn.assistant for d in said for turn in d.turns),
            "cleaning": dict(self.cleaned),
        }


def check_dataset(
    dataset: Dataset,
    held_out: Dataset | None = None,
    *,
    val_split: float = 0.0,
    seed: int = 0,
    thumbnails: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Check:
    """Look at every image once, in threads (Pillow decodes without Python's lock), and every text.

    Args:
        held_out: read it too, and say which of its images are in `dataset`, or look like one there.
        val_split: without `held_out`, say which near-duplicates `split_examples` would put on both sides.
        thumbnails: so many examples, spread evenly, keep a small copy of their image.
    """
    every = max(1, len(dataset.examples) // thumbnails) if thumbnails else 0
    shown = {ref for e in (dataset.examples[::every] if every else ()) for ref in e.images[:1]}
    both = dataset.examples + (held_out.examples if held_out else ())
    refs = list(dict.fromkeys(ref for e in both for ref in e.images))
    seen: dict[ImageRef, Seen] = {}
    for look in _in_threads(lambda ref: look_at(ref, thumbnail=ref in shown), refs):
        seen[look.ref] = look
        progress(len(seen), len(refs))
    bad = list(dataset.bad + (held_out.bad if held_out else ()))
    train, held, cleaned = [], [], Counter({"texts": 0})
    for number, example in enumerate(both):
        if errors := [seen[ref].error for ref in example.images if seen[ref].error]:
            bad += bad_rows(example, errors[0])
        else:
            (train if number < len(dataset.examples) else held).append(example)
            for text in _texts(example):
                reasons = clean_text(text)[1]
                cleaned.update(reasons)
                cleaned["texts"] += bool(reasons)
    looks = [look for look in seen.values() if not look.error]
    near, near_cut = near_duplicates(looks)
    sides = _split(train, seen, val_split, seed) if val_split and held_out is None else (train, held)
    leaks = _leaks(near, sides, seen)
    by_hash: dict[str, list[str]] = {}
    for look in looks:
        by_hash.setdefault(look.sha256, []).append(look.ref.name)
    return Check(
        dataset=dataset,
        examples=tuple(train),
        held_out=tuple(held),
        seen=seen,
        bad=tuple(bad),
        duplicates=tuple(tuple(names) for names in by_hash.values() if len(names) > 1),
        near=tuple((a.ref.name, b.ref.name) for a, b in near),
        near_cut=near_cut,
        leaks=tuple((a.ref.name, b.ref.name) for a, b in leaks),
        cleaned=cleaned,
    )


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
    import numpy as np

    if len(looks) < 2:
        return [], False
    minis = np.frombuffer(b"".join(look.miniature for look in looks), np.uint8).reshape(len(looks), 8, 9, 3)
    grey = minis @ np.array([0.299, 0.587, 0.114], np.float32)
    # dHash: whether each of 8x8 places is darker than its right neighbour; scale and contrast do not matter
    darker = (grey[:, :, :-1] + NEAR_GREY < grey[:, :, 1:]).reshape(len(looks), 64)
    bits = np.packbits(darker, axis=1).view(np.uint64)[:, 0]
    flat = minis.reshape(len(looks), -1).astype(np.int16)
    found: set[tuple[int, int]] = set()
    for group in _groups_with_equal_bits(bits):
        for start in range(0, len(group), 256):
            block = group[start : start + 256]
            rest = group[start:]
            close = np.bitwise_count(bits[block][:, None] ^ bits[rest][None]) <= NEAR_BITS
            first, second = np.nonzero(np.triu(close, k=1))
            first, second = block[first], rest[second]
            alike = np.concatenate(
                [  # in pieces: all of a folder of one colour may be close
                    np.abs(flat[first[at : at + 65536]] - flat[second[at : at + 65536]]).mean(axis=1) <= NEAR_COLOUR
                    for at in range(0, len(first), 65536)
                ]
                or [np.zeros(0, bool)]
            )
            found.update(zip(first[alike].tolist(), second[alike].tolist(), strict=True))
            if len(found) >= MAX_PAIRS:
                break
        if len(found) >= MAX_PAIRS:
            break
    pairs = [(looks[a], looks[b]) for a, b in sorted(found)]
    return [(a, b) for a, b in pairs if a.sha256 != b.sha256], len(found) >= MAX_PAIRS


def _groups_with_equal_bits(bits: Any) -> Iterator[Any]:
    """Indices, ascending, of hashes that agree in a fifth of their bits: any two near ones do, in some fifth.

    So not every image is compared with every other.
    """
    import numpy as np

    for shift in range(0, 64, 13):  # NEAR_BITS + 1 bands
        band = (bits >> np.uint64(shift)) & np.uint64((1 << 13) - 1)
        order = np.argsort(band, kind="stable")
        borders = np.concatenate([[0], np.nonzero(np.diff(band[order]))[0] + 1, [len(order)]])
        for which in np.nonzero(np.diff(borders) > 1)[0]:
            yield order[borders[which] : borders[which + 1]]


def num_workers() -> int:
    """Threads that decode images."""
    return min(32, os.cpu_count() or 1)


def _in_threads(work: Callable[[ImageRef], Seen], refs: Sequence[ImageRef]) -> Iterator[Seen]:
    """Results in order. A part at a time, so that a stop (Ctrl-C) need not wait for all of the rest."""
    workers = num_workers()
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(refs), 64 * workers):
            part = refs[start : start + 64 * workers]
            chunks = [
                part[at : at + 8] for at in range(0, len(part), 8)
            ]  # handing one over costs as much as a thumbnail
            for looks in pool.map(lambda chunk: [work(ref) for ref in chunk], chunks):
                yield from looks


def _texts(example: Example) -> Iterator[str]:
    for dialogue in example.dialogues:
        for turn in dialogue.turns:
            yield from (turn.user, turn.assistant)
        yield from dialogue.accepted


def _split(
    examples: Sequence[Example], seen: dict[ImageRef, Seen], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    hashed = [  # so that the split reads no image a second time
        replace(e, images=tuple(replace(ref, sha256=seen[ref].sha256) for ref in e.images)) for e in examples
    ]
    try:
        _, held = split_examples(hashed, fraction, seed)
    except DataError:  # all images are of one group, which no split parts
        held = []
    held_ids = {example.id for example in held}
    return [e for e in examples if e.id not in held_ids], [e for e in examples if e.id in held_ids]


def _leaks(
    near: list[tuple[Seen, Seen]], sides: Sequence[Sequence[Example]], seen: dict[ImageRef, Seen]
) -> list[tuple[Seen, Seen]]:
    """Pairs (in training, held out): the same bytes, which a split of ours never has, then lookalikes."""
    train, held = ({seen[ref].sha256: seen[ref] for e in side for ref in e.images} for side in sides)
    pairs = [(train[key], held[key]) for key in held if key in train]
    for pair in near:
        pairs += [(a, b) for a, b in (pair, pair[::-1]) if a.sha256 in train and b.sha256 in held]
    return pairs


def _spread(numbers: Iterable[int]) -> dict[str, float]:
    ordered = sorted(numbers)
    if not ordered:
        return {}
    mean = round(sum(ordered) / len(ordered), 2)
    return {"least": ordered[0], "median": ordered[len(ordered) // 2], "most": ordered[-1], "mean": mean}
