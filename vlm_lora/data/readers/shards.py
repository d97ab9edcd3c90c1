"""WebDataset: tar shards whose neighbouring members of one name, but for the ending, are one row.

Members are read where they lie: nothing is extracted, so names cannot lead out of a folder; nothing is
unpickled or run, whatever a member is called. A new row begins with a new name, as in WebDataset itself.
"""

import json
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from vlm_lora.data.example import MAX_FILE_BYTES, FilePart, ImageRef
from vlm_lora.data.images import IMAGE_SUFFIXES, content_hash
from vlm_lora.data.origin import depend_on
from vlm_lora.data.readers.gather import BadRow, Row, Rows
from vlm_lora.data.readers.tables import MAX_TEXT_BYTES, decode_text
from vlm_lora.errors import DataError

TEXTS = (".txt", ".caption")
DAMAGE = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError)
"""What tarfile raises for bytes that are no tar."""


def read_tar(path: Path, source: str) -> Rows:
    """Rows of one shard, numbered from 1: the images as ImageRefs, a .txt as caption, the fields of a .json.

    `1.mask.png` beside `1.jpg` is another thing about it and not opened; alone, `1.a.png` and `1.b.png` are two images.
    Members of other endings (.cls, .npy, .pyd) are not opened: each is a field of its ending that nothing takes up.
    """
    depend_on(path)
    try:
        with tarfile.open(path, "r:") as tar:
            for number, (_, group) in enumerate(groupby(_members(tar), key=_key), start=1):
                try:
                    yield Row(source, number, _row(path, list(group)))
                except DataError as error:
                    yield BadRow(source, number, str(error))
    except DAMAGE as error:
        unpack = "unpack a compressed one, or write it again"
        raise DataError(f"{source}: is not readable as an uncompressed tar: {error}; {unpack}") from None


def _members(tar: Any) -> Iterator[tarfile.TarInfo | Exception]:
    """All but folders and hidden files of a `TarFile`; damage as the last one, so that what is before is not lost."""
    try:
        for member in tar:
            tar.members = []  # tarfile remembers every member: gigabytes for millions of them
            if not member.isdir() and not PurePosixPath(member.name).name.startswith((".", "__")):
                yield member
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile ends there without a word
            raise tarfile.ReadError(f"a damaged header or a missing end at byte {tar.offset:,}")
    except DAMAGE as error:
        yield error


def _key(member: tarfile.TarInfo | Exception) -> object:
    """WebDataset's key: all up to the first dot of the file's own name; damage is a row of its own."""
    if isinstance(member, Exception):
        return member
    folder, slash, file = member.name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _row(path: Path, members: list[tarfile.TarInfo | Exception]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    images, captions, names = [], [], []
    for member in members:
        if isinstance(member, Exception):
            raise DataError(f"cannot be read: {member}; nothing from here on is read")
        names.append(repr(member.name))
        suffix = PurePosixPath(member.name).suffix.lower()
        if suffix not in IMAGE_SUFFIXES and suffix not in (*TEXTS, ".json"):
            row[PurePosixPath(member.name).name.partition(".")[2]] = "a member that is not opened"
            continue
        if not member.isreg() or member.issparse():
            raise DataError(f"{member.name!r} is a link, a device or a sparse file; expected the file itself")
        limit = MAX_FILE_BYTES if suffix in IMAGE_SUFFIXES else MAX_TEXT_BYTES
        if member.size > limit:
            raise DataError(f"{member.name!r} has {member.size:,} bytes, the limit is {limit:,}; shrink it")
        place = FilePart(path, member.name, member.offset_data, member.size)
        data = place.read()
        if suffix in IMAGE_SUFFIXES:
            images.append(ImageRef(path, member.name, member.size, content_hash(data), place))
        elif suffix == ".json":
            row |= _fields(member.name, data)
        else:
            captions.append(decode_text(data, member.name).rstrip("\r\n"))
    found, images = images, [ref for ref in images if PurePosixPath(ref.name).name.count(".") == 1] or images
    for ref in found:
        if ref not in images:
            row[PurePosixPath(ref.name).name.partition(".")[2]] = "an image that is not opened"
    if not images:
        raise DataError(f"has no image among its members {', '.join(names[:8])}; expected one beside its text")
    row.pop("images", None)  # where a .json names images, they are those beside it
    if captions:
        if row.get("caption", captions[0]) != captions[0] or len(captions) > 1:
            raise DataError("says different captions in its text and .json members; keep one")
        row["caption"] = captions[0]
    return row | {"image": images if len(images) > 1 else images[0]}


def _fields(name: str, data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(decode_text(data, name))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name!r} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise DataError(f"{name!r} is not an object with named fields but {type(fields).__name__}")
    return fields
