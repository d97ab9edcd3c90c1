"""The examples of a data set as text and numbers: none is kept as an object, each is made when it is asked for.

An image with five captions is some 600 bytes this way, and 15 KB as objects.
"""

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from vlm_lora.data.example import Box, ByteSource, Dialogue, Example, ImageRef, Turn

MOST_SHARED = 1024
"""Texts that are kept once for all examples: folders, files of rows, prompts, the commonest questions."""
WIDTH = 16
"""Bytes of a hash."""
_encode = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":")).encode
_decode = json.JSONDecoder().raw_decode
_OF_DIALOGUES = (None, "", "", None, "", "", None, (), (), (), ())
"""What a dialogue has from its line to its boxes, where nothing is said."""
_OF_IMAGES = ("", None, None, None)
_OF_EXAMPLES = (0, 1, None, None)


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """What `Examples` are made from: JSON of each example without its dialogues, and of each dialogue.

    ``head_ends`` ``(examples,)`` and ``said_ends`` ``(dialogues,)`` are where each one's JSON ends; ``order``
    ``(dialogues,)`` has the dialogues by example, those of number ``i`` from ``first[i]`` to ``first[i + 1]``.
    ``shared`` are texts and other values that JSON has numbers for. ``digests`` ``(examples, 16)`` are hashes of what
    is said of each, ``system`` the system prompt of all that is said, None where it is not one.
    """

    heads: memoryview
    head_ends: np.ndarray
    said: memoryview
    said_ends: np.ndarray
    order: np.ndarray
    first: np.ndarray
    digests: np.ndarray
    shared: list
    system: str | None


class Examples(Sequence[Example]):
    """Examples, as a tuple has them, but for what they take: each is made anew when it is asked for.

    Attributes:
        facts: what was found out of all of them, by name, as plain values.
    """

    def __init__(self, columns: Columns, which: np.ndarray | None = None, changed: Mapping[int, Example] | None = None):
        self.columns, self.which, self.changed = columns, which, changed or {}
        self.facts: dict[str, Any] = {}

    @classmethod
    def of(cls, examples: Iterable[Example]) -> "Examples":
        """These examples, packed if they are not."""
        if isinstance(examples, Examples):
            return examples
        packer = Packer()
        for example in examples:
            packer.add(example)
        return packer.done()

    def __len__(self) -> int:
        return len(self.columns.head_ends if self.which is None else self.which)

    @overload
    def __getitem__(self, at: int) -> Example: ...

    @overload
    def __getitem__(self, at: slice) -> "Examples": ...

    def __getitem__(self, at: "int | slice") -> "Example | Examples":
        if isinstance(at, slice):
            return self.take(range(len(self))[at])
        number = self._number(at)
        return self.changed.get(number) or _example(self.columns, number)

    def __iter__(self) -> Iterator[Example]:
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __add__(self, other: Iterable[Example]) -> tuple[Example, ...]:
        return (*self, *other)

    def __radd__(self, other: Iterable[Example]) -> tuple[Example, ...]:
        return (*other, *self)

    def __repr__(self) -> str:
        return f"<{len(self):,} examples>"

    def take(self, at: Sequence[int] | np.ndarray, changed: Mapping[int, Example] | None = None) -> "Examples":
        """Those at these places, in this order; of some, by their place here, with fewer dialogues."""
        at = np.asarray(at, dtype=np.int64)
        other = {self._number(place): example for place, example in (changed or {}).items()}
        return Examples(self.columns, at if self.which is None else self.which[at], {**self.changed, **other})

    @property
    def images(self) -> Iterator[tuple[ImageRef, ...]]:
        """The images of each, as cheaply as they can be had."""
        yield from (_images(self.columns, images) for images, *_ in self._heads())

    @property
    def weights(self) -> list[int]:
        return [head[2] if len(head) > 2 else 1 for head in self._heads()]

    @cached_property
    def num_answers(self) -> np.ndarray:
        """``(examples,)`` dialogues of each."""
        counts = np.diff(self.columns.first)
        for number, example in self.changed.items():
            counts[number] = len(example.dialogues)
        return counts if self.which is None else counts[self.which]

    def said(self, at: int) -> bytes:
        """A hash of all that is said of the images in one: of what decides how many tokens it takes."""
        number = self._number(at)
        if number in self.changed:
            return Examples.of([self.changed[number]]).said(0)
        return self.columns.digests[number].tobytes()

    def _heads(self) -> Iterator[list]:
        for number in range(len(self)) if self.which is None else self.which.tolist():
            yield _part(self.columns.heads, self.columns.head_ends, number)

    def _number(self, at: int) -> int:
        if self.which is not None:
            return int(self.which[at])
        return range(len(self.columns.head_ends))[at]


class Packer:
    """Packs examples as they come: the dialogues of one need not come together."""

    def __init__(self) -> None:
        self._heads, self._said = bytearray(), bytearray()
        self._head_ends, self._said_ends, self._examples = array("q"), array("q"), array("i")
        self._digests = bytearray()
        self._systems: set[str] = set()  # two at most
        self._shared: list = []
        self._numbers: dict[object, int] = {}

    def add(self, example: Example) -> None:
        at = self.begin(example)
        for dialogue in example.dialogues:
            self.say(at, dialogue)

    def begin(self, example: Example) -> int:
        """Its number, for `say`. Its dialogues are left out, but for the first one, which mostly says whence it is."""
        first = example.dialogues[0] if example.dialogues else None
        is_first = first is not None and (example.source, example.line) == (first.source, first.line)
        whence = (None, None) if is_first else (self._share(example.source), example.line)
        own = "+".join(ref.name for ref in example.images)
        rest = [0 if example.id == own else example.id, example.weight, *whence]
        images = list(map(self._image, example.images))
        self._heads += _bytes([images, *_trimmed(rest, _OF_EXAMPLES)])
        self._head_ends.append(len(self._heads))
        self._digests += bytes(WIDTH)
        return len(self._head_ends) - 1

    def say(self, example: int, d: Dialogue) -> None:
        """One more dialogue of the example of this number."""
        share = self._share
        turns = []
        for turn in d.turns:
            more = [turn.weight, turn.images] if turn.images else [turn.weight] if turn.weight != 1.0 else []
            turns.append([share(turn.user), turn.assistant, *more])
        boxes = [(box.points, box.image, box.size, box.clipped) for box in d.boxes]
        rest = [d.line, share(d.source), share(d.prompt), d.caption, share(d.system), share(d.split), share(d.kind)]
        rest += [d.accepted, d.choices, d.refs, tuple(boxes)]
        self._said += _bytes([turns, *_trimmed(rest, _OF_DIALOGUES)])
        self._said_ends.append(len(self._said))
        self._examples.append(example)
        if len(self._systems) < 2:
            self._systems.add(d.system)
        spoken = [(turn.user, turn.assistant, turn.images, turn.weight) for turn in d.turns]
        own = slice(example * WIDTH, (example + 1) * WIDTH)
        said = f"{self._digests[own].hex()} {(d.system, spoken, d.refs, d.boxes)!r}".encode("utf-8", "surrogatepass")
        self._digests[own] = hashlib.blake2b(said, digest_size=WIDTH).digest()

    def done(self) -> Examples:
        examples = np.array(self._examples, dtype=np.int64)
        order = np.argsort(examples, kind="stable").astype(np.int32)
        counts = np.bincount(examples, minlength=len(self._head_ends))
        first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        ends = np.array(self._head_ends, dtype=np.int64), np.array(self._said_ends, dtype=np.int64)
        heads, said = memoryview(bytes(self._heads)), memoryview(bytes(self._said))
        digests = np.frombuffer(bytes(self._digests), dtype=np.uint8).reshape(-1, WIDTH)
        system = next(iter(self._systems)) if len(self._systems) == 1 else None
        return Examples(Columns(heads, ends[0], said, ends[1], order, first, digests, self._shared, system))

    def _share(self, text: str | None) -> "str | int | None":
        """A number for a text that may come again, if it has one."""
        if not text:
            return text
        if (number := self._numbers.get(text)) is None:
            if len(self._shared) >= MOST_SHARED:
                return text
            number = self._remember(text, text)
        return number

    def _remember(self, key: object, value: object) -> int:
        self._numbers[key] = len(self._shared)
        self._shared.append(value)
        return self._numbers[key]

    def _image(self, ref: ImageRef) -> list:
        path = str(ref.path)
        cut = path.rfind(os.sep) + 1
        base = path[cut:]
        # Mostly the name ends as the path does
        name = self._share(ref.name.removesuffix(base)) if base and ref.name.endswith(base) else [ref.name]
        rest = [name, ref.size, ref.sha256, ref.embedded and self._embedded(ref.embedded)]
        return [self._share(path[:cut]), base, *_trimmed(rest, _OF_IMAGES)]

    def _embedded(self, source: ByteSource) -> list:
        """Its class and its fields: texts and numbers as they are, what else there is by number, in a list."""
        values = [type(source), *(getattr(source, each.name) for each in fields(source))]  # type: ignore[arg-type]
        return [value if value is None or isinstance(value, str | int) else [self._object(value)] for value in values]

    def _object(self, value: object) -> int:
        key = value if isinstance(value, Path | type) else ("object", id(value))  # kept here, so the id stays its own
        return self._numbers[key] if key in self._numbers else self._remember(key, value)


def _trimmed(values: list, defaults: tuple) -> list:
    while values and values[-1] == defaults[len(values) - 1]:
        values.pop()
    return values


def _filled(values: list, defaults: tuple) -> Any:
    return (*values, *defaults[len(values) :])


def _bytes(value: object) -> bytes:
    return _encode(value).encode("utf-8", "surrogatepass")


def _part(texts: memoryview, ends: np.ndarray, number: int) -> list:
    start = int(ends[number - 1]) if number else 0
    return _decode(str(texts[start : int(ends[number])], "utf-8", "surrogatepass"))[0]


def _example(columns: Columns, number: int) -> Example:
    images, *rest = _part(columns.heads, columns.head_ends, number)
    own, weight, source, line = _filled(rest, _OF_EXAMPLES)
    refs = _images(columns, images)
    start, end = columns.first[number : number + 2].tolist()
    dialogues = tuple(_dialogue(columns, each) for each in columns.order[start:end].tolist())
    if source is None:
        source, line = (dialogues[0].source, dialogues[0].line) if dialogues else ("", None)
    name = "+".join(ref.name for ref in refs) if own == 0 else own
    return Example(name, refs, dialogues, _text(columns, source), weight, line)


def _text(columns: Columns, value: "str | int | None") -> Any:
    return columns.shared[value] if isinstance(value, int) else value


def _images(columns: Columns, images: list) -> tuple[ImageRef, ...]:
    refs = []
    for folder, base, *rest in images:
        name, size, sha256, embedded = _filled(rest, _OF_IMAGES)
        name = name[0] if isinstance(name, list) else _text(columns, name) + base
        if embedded:
            made, *values = (columns.shared[each[0]] if isinstance(each, list) else each for each in embedded)
            embedded = made(*values)
        refs.append(ImageRef(Path(_text(columns, folder) + base), name, size, sha256, embedded))
    return tuple(refs)


def _dialogue(columns: Columns, number: int) -> Dialogue:
    said, *rest = _part(columns.said, columns.said_ends, number)
    rest = _filled(rest, _OF_DIALOGUES)
    line, source, prompt, caption, system, split, kind, accepted, choices, refs, boxes = rest
    turns = []
    for user, assistant, *more in said:
        weight, images = _filled(more, (1.0, ()))
        turns.append(Turn(_text(columns, user), assistant, tuple(images), weight))
    made = tuple(Box(tuple(points), image, tuple(size), clipped) for points, image, size, clipped in boxes)
    source, prompt, system, split, kind = (_text(columns, each) for each in (source, prompt, system, split, kind))
    return Dialogue(
        tuple(turns), kind, tuple(accepted), tuple(choices), tuple(refs), made, system, caption, prompt, split, source,
        line,
    )  # fmt: skip


class Unique:
    """No id twice: two images may have one name, embedded ones called "image.jpg", or one in each of two folders."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._times: Counter[str] = Counter()

    def id(self, wanted: str) -> str:
        """This one, or with "#2" and so on after it."""
        id = wanted
        while id in self._taken:
            self._times[wanted] += 1
            id = f"{wanted}#{self._times[wanted] + 1}"
        self._taken.add(id)
        return id


def with_ids(examples: Iterable[Example]) -> Examples:
    """These examples, no id twice."""
    unique = Unique()
    return Examples.of(replace(e, id=id) if (id := unique.id(e.id)) != e.id else e for e in examples)
