"""What a reader yields, and gathering it by image: rows about the same image become one `Example`."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from vlm_lora.data.example import Dialogue, Example, ImageRef


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was set aside; nothing else of the data is lost with it."""

    source: str
    """File, relative to the folder that was read."""
    line: int | None
    """From 1; the row's number where the format has no lines (Parquet), None where it has neither."""
    reason: str
    """What was found, what was expected, what to do."""


@dataclass(frozen=True, slots=True)
class Said:
    """One dialogue and the images it is about: what becomes part of an Example."""

    images: tuple[ImageRef, ...]
    dialogue: Dialogue
    source: str
    """`file:line`"""


@dataclass(frozen=True, slots=True)
class Dataset:
    """All that was found: every row is a dialogue of one of `examples`, or in `bad`."""

    format: str
    examples: tuple[Example, ...]
    bad: tuple[BadRow, ...]
    note: str = ""
    """Which columns were taken for what, where the data has columns."""

    def fingerprint(self) -> str:
        """Hash (hex) of ids, texts, image names and sizes, in order. Reads no image; survives a move."""
        digest = hashlib.sha256()
        for example in self.examples:
            images = [(ref.name, ref.sha256 or ref.size) for ref in example.images]
            dialogues = [([(t.user, t.assistant) for t in d.turns], d.kind, d.accepted) for d in example.dialogues]
            digest.update(json.dumps([example.id, images, dialogues]).encode() + b"\n")
        return digest.hexdigest()


def gather(format: str, found: Iterable[Said | BadRow]) -> Dataset:
    """One Example per image (or ordered few), in order of first appearance; equal dialogues are all kept.

    An image is the same where its resolved path is, or, embedded in another file, where its bytes are.
    """
    bad: list[BadRow] = []
    by_images: dict[tuple, list[Said]] = {}
    for item in found:
        if isinstance(item, BadRow):
            bad.append(item)
        else:
            by_images.setdefault(tuple(r.sha256 or r.path for r in item.images), []).append(item)
    examples, taken = [], set()
    for rows in by_images.values():
        first = rows[0]
        name = id = "+".join(ref.name for ref in first.images)
        number = 1
        while id in taken:  # two images under one name: embedded ones called "image.jpg", or one in each of two folders
            number += 1
            id = f"{name}#{number}"
        taken.add(id)
        examples.append(Example(id, first.images, tuple(row.dialogue for row in rows), first.source))
    return Dataset(format, tuple(examples), tuple(bad))


def bad_row(example: Example, reason: str) -> BadRow:
    """A row of an example as bad, at the place where the example was first named."""
    source, _, line = example.source.rpartition(":")
    return BadRow(source, int(line), reason) if line.isdecimal() else BadRow(example.source, None, reason)
