"""What a reader yields, and gathering it by image: rows about the same image become one `Example`."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

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
    unread: str = ""
    """What was left alone of a folder that holds more than one thing."""
    parts: tuple[str, ...] = ()
    """What each of several sources holds, a line each."""

    @property
    def taken_for(self) -> str:
        """The format, which columns were taken for what, and what was left unread."""
        told = "; ".join(filter(None, (self.note, self.unread)))
        return f"{self.format} ({told})" if told else self.format

    def fingerprint(self) -> str:
        """Hash (hex) of ids, texts, image names and sizes, in order. Reads no image; survives a move."""
        digest = hashlib.sha256()
        for example in self.examples:
            images = [(ref.name, ref.sha256 or ref.size) for ref in example.images]
            dialogues = [([(t.user, t.assistant) for t in d.turns], d.kind, d.accepted) for d in example.dialogues]
            digest.update(json.dumps([example.id, images, dialogues, example.weight]).encode() + b"\n")
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
    examples = []
    for rows in by_images.values():
        name = "+".join(ref.name for ref in rows[0].images)
        dialogues = tuple(replace(row.dialogue, source=row.source) for row in rows)
        examples.append(Example(name, rows[0].images, dialogues, rows[0].source))
    return Dataset(format, with_ids(examples), tuple(bad))


def with_ids(examples: Iterable[Example]) -> tuple[Example, ...]:
    """No id twice: two images may have one name, embedded ones called "image.jpg", or one in each of two folders."""
    found: dict[str, Example] = {}
    times: Counter = Counter()
    for example in examples:
        id = example.id
        while id in found:
            times[example.id] += 1
            id = f"{example.id}#{times[example.id] + 1}"
        found[id] = example if id == example.id else replace(example, id=id)
    return tuple(found.values())


def join(sources: Iterable[tuple[str, str, int, Dataset]]) -> Dataset:
    """Several data sets as one; of each: what it is called, the folder its names are below, its weight, the data.

    An image that two of them have stays an example of each.
    """
    examples, bad, parts, formats = [], [], [], []
    for called, folder, weight, dataset in sources:
        named = below(folder, dataset)
        examples += [replace(example, weight=weight) for example in named.examples]
        bad += named.bad
        formats.append(dataset.format)
        answers = sum(len(e.dialogues) for e in dataset.examples)
        times = f", each {weight} times an epoch" if weight > 1 else ""
        parts.append(f"{called}: {len(dataset.examples):,} examples, {answers:,} answers{times}; {dataset.taken_for}")
    return Dataset(" + ".join(dict.fromkeys(formats)), with_ids(examples), tuple(bad), parts=tuple(parts))


def below(folder: str, dataset: Dataset) -> Dataset:
    """The data set with this folder in front of the names of images and files, "" for none."""
    before = f"{folder}/" if folder else ""

    def moved(e: Example) -> Example:
        images = tuple(replace(ref, name=before + ref.name) for ref in e.images)
        dialogues = tuple(replace(d, source=before + d.source) for d in e.dialogues)
        return replace(e, id=before + e.id, images=images, dialogues=dialogues, source=before + e.source)

    bad = tuple(replace(row, source=before + row.source) for row in dataset.bad)
    return replace(dataset, examples=tuple(map(moved, dataset.examples)), bad=bad)


def bad_rows(example: Example, reason: str) -> list[BadRow]:
    """All rows of an example as bad."""
    return [bad_row(dialogue.source, reason) for dialogue in example.dialogues]


def bad_row(place: str, reason: str) -> BadRow:
    """The row at a place, which is the `source` of a dialogue: `file:line`, or `file:row 3` where rows share a line."""
    source, _, line = place.rpartition(":")
    return BadRow(source, int(line), reason) if line.isdecimal() else BadRow(place, None, reason)
