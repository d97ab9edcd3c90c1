"""What readers yield, and gathering it by image: rows about the same image become one `Example`."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from vlm_lora.data.example import Dialogue, Example, ImageRef, Placed
from vlm_lora.data.examples import Examples, Packer, Unique, with_ids
from vlm_lora.data.readers.boxes import has_numbers


@dataclass(frozen=True, slots=True)
class BadRow(Placed):
    """A row that cannot be used. Nothing else of the data is lost with it."""

    source: str
    """The file, relative to the folder that was read."""
    line: int | None
    """The line, from 1; the number of the row if the format has no lines (Parquet); None if it has neither."""
    reason: str
    """What was found, what was expected, and what to do."""


@dataclass(frozen=True, slots=True)
class Row(Placed):
    """One row of a table, before anybody knows what it means."""

    source: str
    line: int | None
    value: object


class ClassName(str):
    """The name of a class, where a row has its number."""


Rows = Iterator[Row | BadRow]
Entry = tuple[tuple[ImageRef, ...], Dialogue]
"""Images and a dialogue about them: what becomes part of an Example."""


@dataclass(frozen=True, slots=True, repr=False)
class Dataset:
    """What `read_dataset` found. Every row is a dialogue in `examples`, `val` or `test`, or it is in `bad`."""

    format: str
    """The format that was detected: "sidecar", "coco", "messages" and so on."""
    examples: Sequence[Example]
    """What may be trained on: one Example for each image, in the order of the data. As `read_dataset` gives them, each
    is made when it is asked for."""
    bad: tuple[BadRow, ...]
    """The rows that cannot be used, each with file, line and reason."""
    val: Sequence[Example] = ()
    """Examples that the data marks for validation; never trained on."""
    test: Sequence[Example] = ()
    """Examples that the data marks for testing; never trained on."""
    note: str = ""
    """Which columns were taken for what, if the data has columns."""
    unread: str = ""
    """What was left alone in a folder that holds more than one thing."""
    unused: dict[str, int] = field(default_factory=dict)
    """Fields that nothing uses, and how many rows have each."""
    parts: tuple[str, ...] = ()
    """If several sources were read: a line for each."""

    def __repr__(self) -> str:
        answers = int(Examples.of(self.examples).num_answers.sum())
        sides = {"val": self.val, "test": self.test, "bad": self.bad}
        apart = "".join(f", {len(side):,} {name}" for name, side in sides.items() if side)
        return f"<Dataset of {self.format}: {len(self.examples):,} examples, {answers:,} answers{apart}>"

    @property
    def taken_for(self) -> str:
        """In words: the format, which columns were taken for what, and what was not read."""
        apart = [
            f"{len(side):,} examples are marked {name} and never trained on"
            for name, side in (("val", self.val), ("test", self.test))
            if side
        ]
        details = "; ".join(filter(None, (self.note, self.named_unused, told_boxes(self.boxes), *apart, self.unread)))
        return f"{self.format} ({details})" if details else self.format

    @property
    def boxes(self) -> dict[str, int]:
        """Counts, without those that are 0: boxes and points that were "read", those "clipped" at the edge of their
        image, and texts with boxes as numbers in JSON, learnt "as_is"."""
        counts = Counter()
        for side in map(Examples.of, (self.examples, self.val, self.test)):
            if "boxes" not in side.facts:
                side.facts["boxes"] = _count_boxes(side)
            counts.update(side.facts["boxes"])
        return {name: counts[name] for name in ("read", "clipped", "as_is") if counts[name]}

    @property
    def named_unused(self) -> str:
        """The fields that nothing uses, in words; "" if there are none."""
        named = [f"{name!r} in {times:,}" for name, times in self.unused.items()]
        more = f" and {len(named) - 12} more" if len(named) > 12 else ""
        return f"unused columns, and rows that have them: {', '.join(named[:12])}{more}" if named else ""

    @property
    def in_one(self) -> "Dataset":
        """The same data set with all examples in `examples`, whatever part they are marked for."""
        return replace(self, examples=with_ids(chain(self.examples, self.val, self.test)), val=(), test=())

    def part(self, *names: str) -> "Dataset":
        """The data set of the examples marked "val" or "test", as named; of `examples` if none is marked so."""
        marked = chain.from_iterable(getattr(self, name) for name in names)
        return replace(self, examples=with_ids(marked) or self.examples, val=(), test=())

    def fingerprint(self) -> str:
        """A hash, in hex, of ids, texts, and names and sizes of images, in order. It reads no image, and stays the same
        if the folder moves."""
        examples = Examples.of(self.examples)
        if "fingerprint" not in examples.facts:
            examples.facts["fingerprint"] = _fingerprint(examples)
        return examples.facts["fingerprint"]


def _fingerprint(examples: Iterable[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        images = [(ref.name, ref.sha256 or ref.size) for ref in example.images]
        dialogues = [([(t.user, t.assistant) for t in d.turns], d.kind, d.accepted) for d in example.dialogues]
        digest.update(json.dumps([example.id, images, dialogues, example.weight]).encode() + b"\n")
        # What came later is hashed only where it is: a run of an earlier version can still be resumed.
        later = [(d.system, [(t.images, t.weight) for t in d.turns]) for d in example.dialogues]
        if any(system or any(turn != ((), 1.0) for turn in turns) for system, turns in later):
            digest.update(json.dumps(later).encode() + b"\n")
        if any(d.has_marks for d in example.dialogues):
            marks = [(d.refs, [(box.points, box.image, box.size) for box in d.boxes]) for d in example.dialogues]
            digest.update(json.dumps(marks).encode() + b"\n")
    return digest.hexdigest()


def _count_boxes(examples: Iterable[Example]) -> dict[str, int]:
    counts = Counter()
    for dialogue in (dialogue for example in examples for dialogue in example.dialogues):
        counts["read"] += len(dialogue.boxes)
        counts["clipped"] += sum(box.clipped for box in dialogue.boxes)
        counts["as_is"] += sum(has_numbers(text) for turn in dialogue.turns for text in (turn.user, turn.assistant))
    return dict(counts)


def told_boxes(counts: Mapping[str, int]) -> str:
    """`Dataset.boxes` in words; "" where there are none."""
    form = {
        "read": "{:,} boxes and points",
        "clipped": "{:,} of them cut off at the edge of their image",
        "as_is": "{:,} texts with bbox_2d or point_2d, whose numbers are learnt as they stand unless --json-boxes says "
        "what they are",
    }
    return ", ".join(form[name].format(count) for name, count in counts.items())


def gather(format: str, entries: Iterable[Entry | BadRow]) -> Dataset:
    """One Example per image (or ordered few), in order of first appearance; equal dialogues are all kept.

    An image is the same where its resolved path is, or, embedded in another file, where its bytes are. Each dialogue
    without an image is an Example of its own; so are those of one image that belong to different parts of the data.
    """
    bad: list[BadRow] = []
    sides = {name: (Packer(), Unique()) for name in ("examples", "val", "test")}
    places: dict[tuple, int] = {}
    for number, entry in enumerate(entries):
        if isinstance(entry, BadRow):
            bad.append(entry)
            continue
        images, dialogue = entry
        side = dialogue.split if dialogue.split in ("val", "test") else "examples"
        packer, unique = sides[side]
        key = side, tuple(ref.sha256 or ref.path for ref in images) or number
        if key not in places:
            id = unique.id("+".join(ref.name for ref in images) or dialogue.place)
            places[key] = packer.begin(Example(id, images, (dialogue,), dialogue.source, line=dialogue.line))
        packer.say(places[key], dialogue)
    train, val, test = (packer.done() for packer, _ in sides.values())
    return Dataset(format, train, tuple(bad), val, test)


def bad_rows(example: Example, reason: str) -> list[BadRow]:
    """All rows of an example as bad."""
    return [BadRow(dialogue.source, dialogue.line, reason) for dialogue in example.dialogues]
