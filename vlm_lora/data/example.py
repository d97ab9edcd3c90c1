"""`Example`: one image (or an ordered few) and all that is said about it. No pixels, no tokens."""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Protocol

from vlm_lora.errors import DataError

MAX_FILE_BYTES = 1 << 30  # 50 megapixels of 16-bit RGBA are 400 MB; what is larger than 1 GiB is no picture


def read_regular_file(path: Path, name: str) -> bytes:
    """Bytes of a regular file. Raises DataError for anything else; never waits on a FIFO or a device."""
    try:
        # O_NONBLOCK: opening a FIFO that nobody writes to would wait for ever
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{name!r} cannot be opened: {reason}; check that the file is there and readable") from error
    try:
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{name!r} is not a regular file; expected an image file")
            if status.st_size > MAX_FILE_BYTES:
                raise DataError(f"{name!r} has {status.st_size:,} bytes, the limit is {MAX_FILE_BYTES:,}; shrink it")
            return file.read(max(status.st_size, 65536) + 1)  # Python sets aside as much as it is asked for, at once
    except OSError as error:  # a directory, a bad disk
        raise DataError(f"{name!r} cannot be read: {error.strerror or error}; expected an image file") from error


class ByteSource(Protocol):
    """An image inside another file (a Parquet cell, a member of a tar). Hashable, picklable."""

    def read(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class FilePart:
    """An image as it lies in a larger file: a member of an uncompressed tar, one of many that were fetched."""

    path: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise DataError(f"{self.path.name}: cannot be read: {error.strerror or error}") from error
        if len(data) < self.size:
            raise DataError(f"{self.path.name}: {self.name!r} is cut off; copy or download it again")
        return data


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Where the bytes of one image are: a file, or a part of one. Nothing is read before `read_bytes`."""

    path: Path
    """Absolute and resolved; with `embedded`, the file that holds the image."""
    name: str
    """As written in the data, for messages."""
    size: int | None = None
    """In bytes, when the data was read; None if it was not looked up."""
    sha256: str | None = None
    """Hash of the bytes, in hex; None if the reader did not see them."""
    embedded: ByteSource | None = None
    """What reads the image out of another file; None for a file of its own."""

    def read_bytes(self) -> bytes:
        """The encoded image.

        Raises:
            DataError: the file is gone, unreadable or not a regular file.
        """
        return self.embedded.read() if self.embedded else read_regular_file(self.path, self.name)


class Placed:
    """What has a place in the data: a file, and a line where the file has lines."""

    __slots__ = ()
    source: str
    line: int | None

    @property
    def place(self) -> str:
        """`file:line`, for messages."""
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer."""

    user: str
    """The question."""
    assistant: str
    """The answer, which is learnt."""
    images: tuple[int, ...] = ()
    """Where the images stand in `user`: an index of a character for each, and the image stands before it. If no turn of
    a dialogue has any, all images of the Example stand before the first question."""
    weight: float = 1.0
    """The factor of the answer's loss; with 0 the answer is read and not learnt."""

    @property
    def pieces(self) -> list[str]:
        """`user` cut where its images stand: one piece more than images; pieces may be empty."""
        ends = (0, *self.images, len(self.user))
        return [self.user[a:b] for a, b in pairwise(ends)]

    def asking(self, pieces: Sequence[str]) -> "Turn":
        """The same turn with these pieces as its question, an image between each two."""
        places = accumulate(len(piece) for piece in pieces[:-1])
        return replace(self, user="".join(pieces), images=tuple(places))


REF, BBOX = "<ref-object>", "<bbox>"
"""In the texts of a dialogue with boxes: where the next of its `refs` stands, and the next of its `boxes`."""


@dataclass(frozen=True, slots=True)
class Box:
    """A box or a point, in pixels of one of the Example's images, turned upright; the origin is at the top left."""

    points: tuple[float, ...]
    """(x1, y1, x2, y2) of a box, (x, y) of a point."""
    image: int
    """The index of the image, from 0."""
    size: tuple[int, int]
    """Width and height of that image, in pixels."""
    clipped: bool = field(default=False, compare=False)
    """Whether it reached a little out of the image, and was cut off at the edge."""


@dataclass(frozen=True, slots=True)
class Dialogue(Placed):
    """A conversation about the images of its Example. A caption is a dialogue of one turn, which answers the prompt."""

    turns: tuple[Turn, ...]
    kind: str | None = None
    """The type of the question ("yes/no", "colour"), if the data names one."""
    accepted: tuple[str, ...] = ()
    """All human answers to the last turn, if the data has several; else empty."""
    choices: tuple[str, ...] = ()
    """The options of a multiple choice, that of A first; the last answer is then a letter. Else empty."""
    refs: tuple[str, ...] = ()
    """The names that replace each ``<ref-object>`` of its turns, in order."""
    boxes: tuple[Box, ...] = ()
    """The boxes and points that replace each ``<bbox>`` of its turns, in order."""
    system: str = ""
    """The system message; if empty, the model's chat template has its own or none."""
    caption: bool | None = field(default=None, compare=False)
    """True: a text about the images. False: the answer to a question. None: the question decides."""
    prompt: str = field(default="", compare=False)
    """The prompt that it answers, with its variables; empty if the row has a question of its own."""
    split: str = ""
    """The part of the data that its row names: "train", "val" or "test"; empty if it names none."""
    source: str = field(default="", compare=False)
    """The file of its row; with the row ("x.json:row 3") if the format has no lines."""
    line: int | None = field(default=None, compare=False)
    """The line in `source`, from 1."""

    @property
    def has_marks(self) -> bool:
        """Whether ``<ref-object>`` and ``<bbox>`` stand for something in its turns; else they are plain text."""
        return bool(self.refs or self.boxes)

    @property
    def answers_with_boxes(self) -> bool:
        """Whether its last answer gives a place: with its own boxes, or with ``"bbox_2d"`` in JSON."""
        last = self.turns[-1].assistant
        marked = last.count(BBOX) if self.boxes else 0
        return any(len(box.points) == 4 for box in self.boxes[len(self.boxes) - marked :]) or '"bbox_2d"' in last


@dataclass(frozen=True, slots=True)
class Example(Placed):
    """An image, or several in order, and all dialogues about it. Five COCO captions are five dialogues of one turn."""

    id: str
    """Unique in its data set: the name of the image as the data has it, with "#2" and so on where it comes again."""
    images: tuple[ImageRef, ...]
    """Empty for a dialogue of text alone."""
    dialogues: tuple[Dialogue, ...]
    source: str
    """The file of the first row that named these images."""
    weight: int = 1
    """How often an epoch learns each of its dialogues."""
    line: int | None = None
    """The line of that row, from 1; None if the format has no lines."""
