"""What readers yield, and gathering it by image: rows about the same image become one `Example`."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from vlm_lora.data.example import Dialogue, Example, ImageRef, Placed


@dataclass(frozen=True, slots=True)
class BadRow(Placed):
    """A row that was set aside; nothing else of the data is lost with it."""

    source: str
    """File, relative to the folder that was read."""
    line: int | None
    """From 1; the row's number where the format has no lines (Parquet), None where it has neither."""
    reason: str
    """What was found, what was expected, what to do."""


@dataclass(frozen=True, slots=True)
class Row(Placed):
    """One row of a table, before anybody knows what it means."""

    source: str
    line: int | None
    value: object


Rows = Iterator[Row | BadRow]
Entry = tuple[tuple[ImageRef, ...], Dialogue]
"""Images and a dialogue about them: what becomes part of an Example."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """All data that were read: every row is a dialogue of one of `examples`, or in `bad`."""

    format: str
    examples: tuple[Example, ...]
    bad: tuple[BadRow, ...]
    note: str = ""
    """Which columns were taken for what, where the data have columns."""
    unread: str = ""
    """What was left alone of a folder that holds more than one thing."""
    parts: tuple[str, ...] = ()
    """What each of several sources holds, a line each."""

    @property
    def taken_for(self) -> str:
        """The format, which columns were taken for what, and what was left unread."""
        details = "; ".join(filter(None, (self.note, self.unread)))
        return f"{self.format} ({details})" if details else self.format

    def fingerprint(self) -> str:
        """Hash (hex) of ids, texts, image names and sizes, in order. Reads no image; survives a move."""
        digest = hashlib.sha256()
        for example in self.examples:
            images = [(ref.name, ref.sha256 or ref.size) for ref in example.images]
            dialogues = [([(t.user, t.assistant) for t in d.turns], d.kind, d.accepted) for d in example.dialogues]
            digest.update(json.dumps([example.id, images, dialogues, example.weight]).encode() + b"\n")
        return digest.hexdigest()


def gather(format: str, entries: Iterable[Entry | BadRow]) -> Dataset:
    """One Example per image (or ordered few), in order of first appearance; equal dialogues are all kept.

    An image is the same where its resolved path is, or, embedded in another file, where its bytes are.
    """
    bad: list[BadRow] = []
    by_images: dict[tuple, list[Entry]] = {}
    for entry in entries:
        if isinstance(entry, BadRow):
            bad.append(entry)
        else:
            by_images.setdefault(tuple(ref.sha256 or ref.path for ref in entry[0]), []).append(entry)
    examples = []
    for same in by_images.values():
        images, first = same[0]
        name = "+".join(ref.name for ref in images)
        dialogues = tuple(dialogue for _, dialogue in same)
        examples.append(Example(name, images, dialogues, first.source, line=first.line))
    return Dataset(format, with_ids(examples), tuple(bad))


def with_ids(examples: Iterable[Example]) -> tuple[Example, ...]:
    """No id twice: two images may have one name, embedded ones called "image.jpg", or one in each of two folders."""
    by_id: dict[str, Example] = {}
    times: Counter[str] = Counter()
    for example in examples:
        id = example.id
        while id in by_id:
            times[example.id] += 1
            id = f"{example.id}#{times[example.id] + 1}"
        by_id[id] = example if id == example.id else replace(example, id=id)
    return tuple(by_id.values())


def bad_rows(example: Example, reason: str) -> list[BadRow]:
    """All rows of an example as bad."""
    return [BadRow(dialogue.source, dialogue.line, reason) for dialogue in example.dialogues]
