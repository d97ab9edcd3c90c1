"""Train and validation by image, never by row: no picture is on both sides."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain

import numpy as np

from vlm_lora.data.example import Example, ImageRef
from vlm_lora.data.examples import Examples
from vlm_lora.data.images import content_hash
from vlm_lora.data.readers import Dataset, bad_rows
from vlm_lora.errors import ConfigError, DataError


def bytes_hash(image: ImageRef) -> str:
    """Of the image's bytes, hex: what its reader found, or else by reading it."""
    return image.sha256 or content_hash(image.read_bytes())


def split_examples(
    examples: Sequence[Example], fraction: float, seed: int, hash_of: Callable[[ImageRef], str] = bytes_hash
) -> tuple[Examples, Examples]:
    """(train, validation), each in the order of `examples`; validation has `fraction` (0..1) of those with images.

    Examples that share an image, or a copy of it under another name, stay together. Which go to validation
    follows from the hash of (seed, image bytes) alone: order and names do not matter, and further images only
    shift the border. Asks ``hash_of`` each image once. Raises DataError for fewer than two different images, or
    one that cannot be read; ConfigError for a fraction that is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"--val-split {fraction}: expected a fraction between 0 and 1")
    examples = Examples.of(examples)
    hashes: dict[ImageRef, str] = {}
    group_of: dict[str, str] = {}  # image hash -> another one of its group; a root points to itself

    def root(key: str) -> str:
        while group_of.setdefault(key, key) != key:
            group_of[key] = key = group_of[group_of[key]]
        return key

    firsts: dict[int, str] = {}  # of those with images: the others are there against forgetting
    for number, images in enumerate(examples.images):
        for ref in images:
            if ref not in hashes:
                hashes[ref] = hash_of(ref)
            first = firsts.setdefault(number, hashes[ref])
            low, high = sorted((root(hashes[ref]), root(first)))
            group_of[high] = low  # the smallest hash stands for the group, whatever the order

    groups: dict[str, list[int]] = {}
    for number, first in firsts.items():
        groups.setdefault(root(first), []).append(number)
    if len(groups) < 2:
        raise DataError(
            f"a validation split needs 2 different images, found {len(groups)} in {len(firsts)} examples; "
            "add images, or pass validation data of its own with --val"
        )
    ordered = sorted(groups, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    wanted = max(1, min(len(firsts) - 1, round(len(firsts) * fraction)))
    chosen: set[int] = set()
    for group in ordered:
        if len(chosen) + len(groups[group]) <= wanted:
            chosen.update(groups[group])
    if not chosen:  # every group is larger than what is wanted: the smallest one then
        chosen.update(groups[min(ordered, key=lambda key: len(groups[key]))])
    train = np.setdiff1d(np.arange(len(examples)), list(chosen))
    return examples.take(train), examples.take(sorted(chosen))


def without_held_out(
    dataset: Dataset, held_out: Dataset, held_out_name: str, hash_of: Callable[[ImageRef], str] = bytes_hash
) -> Dataset:
    """The data set, where each example with an image of `held_out` is bad rows: its score would be worth nothing.

    Images are the same where their bytes are. Asks for the hash of those alone that have a size in bytes of the other
    side, once.
    """

    examples = Examples.of(dataset.examples)

    def images(side: Sequence[Example]) -> Iterator[ImageRef]:
        return chain.from_iterable(Examples.of(side).images)

    sizes = {ref.size for ref in images(held_out.examples)}

    def hashed(ref: ImageRef) -> str:
        with suppress(DataError):  # where it is decoded, it is reported
            return hash_of(ref)
        return ""

    ours = {ref.size for ref in images(examples)}
    held = {hashed(ref): ref.name for ref in _of_sizes(images(held_out.examples), ours)}
    held.pop("", None)
    twins = {ref: name for ref in _of_sizes(images(examples), sizes) if (name := held.get(hashed(ref)))} if held else {}
    if not twins:
        return dataset
    kept, bad = [], list(dataset.bad)
    for number, refs in enumerate(examples.images):
        if name := next(filter(None, map(twins.get, refs)), None):
            reason = f"its image is in the held-out data too ({name!r} of {held_out_name}); take it out of one of them"
            bad += bad_rows(examples[number], reason)
        else:
            kept.append(number)
    return replace(dataset, examples=examples.take(kept), bad=tuple(bad))


def _of_sizes(refs: Iterable[ImageRef], sizes: set[int | None]) -> list[ImageRef]:
    return [ref for ref in dict.fromkeys(refs) if ref.size in sizes or None in sizes or ref.size is None]
