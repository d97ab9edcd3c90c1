"""A .zip of any layout, unpacked into the cache folder: once, under the hash of its bytes, over nobody's files."""

import hashlib
import os
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from filelock import FileLock

from vlm_lora.config import CACHE_VARIABLE, cache_folder
from vlm_lora.errors import DataError

MOST_GROWTH, MOST_SMALL = 100, 1 << 30
"""What is in an archive may be this many times as large as it, or this many bytes: pictures are compressed already."""
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError)
"""What zipfile raises for damage, for a password, and for a compression that it does not know."""


def archives_folder() -> Path:
    """Where archives are unpacked, each in a folder of its own."""
    return cache_folder() / "archives"


def is_archive(path: Path) -> bool:
    return path.suffix.lower() == ".zip" and path.is_file()


def unpacked(archive: Path) -> Path:
    """The folder that holds what is in the archive, below the one folder that it may have around everything.

    Raises DataError for a name that leads out, a link, a name that is there twice, a password, damage, and more than
    the disk or `MOST_GROWTH` allow.
    """
    try:
        with archive.open("rb") as file:
            target = archives_folder() / hashlib.file_digest(file, "sha256").hexdigest()
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):  # several processes of one run want it at the same time
            if not target.exists():
                _unpack(archive, target)
    except OSError as error:
        raise DataError(f"{archive.name}: cannot be unpacked: {error.strerror or error}; unpack it yourself") from error
    while len(inside := [path for path in target.iterdir() if not path.name.startswith((".", "__"))]) == 1:
        if not inside[0].is_dir() or re.match(r"\d+_", inside[0].name):  # kohya's 10_birds says how often
            break
        target = inside[0]
    return target


def _unpack(archive: Path, target: Path) -> None:
    """Under another name first: what is there under its own is whole."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="unpacking-") as name:
        try:
            with zipfile.ZipFile(archive) as zipped:
                for member, parts in _members(zipped, archive):
                    path = Path(name, "all", *parts)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with zipped.open(member) as source, path.open("xb") as file:
                        shutil.copyfileobj(source, file)
        except DAMAGE as error:
            raise DataError(f"{archive.name}: is not readable as a zip: {error}; pack it again") from None
        if not Path(name, "all").is_dir():
            raise DataError(f"{archive.name}: holds no file")
        os.replace(Path(name, "all"), target)


def _members(zipped: zipfile.ZipFile, archive: Path) -> Iterator[tuple[zipfile.ZipInfo, tuple[str, ...]]]:
    """The files that are not hidden, each with the parts of its name. Raises DataError before any is written."""
    found: dict[tuple[str, ...], zipfile.ZipInfo] = {}
    for member in zipped.infolist():
        name = member.filename.replace("\\", "/")  # as some programs of Windows write them
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts or re.match(r"[A-Za-z]:", name):
            raise DataError(f"{archive.name}: holds the name {member.filename!r}, which leads out; do not trust it")
        if not parts or name.endswith("/") or any(part.startswith((".", "__")) for part in parts):
            continue
        if stat.S_ISLNK(member.external_attr >> 16):
            raise DataError(f"{archive.name}: holds {member.filename!r}, which is a link; pack the file itself")
        if member.flag_bits & 1:
            raise DataError(f"{archive.name}: is protected by a password; unpack it yourself")
        if parts in found:
            raise DataError(f"{archive.name}: holds {member.filename!r} twice; pack it again")
        found[parts] = member
    size, limit = sum(member.file_size for member in found.values()), archive.stat().st_size * MOST_GROWTH
    if size > max(limit, MOST_SMALL):
        raise DataError(
            f"{archive.name}: would take {size:,} bytes, more than {MOST_GROWTH} times its own: pictures do not shrink "
            "like that; unpack it yourself if you trust it"
        )
    free = shutil.disk_usage(archives_folder()).free
    if size > 0.9 * free:
        raise DataError(
            f"{archive.name}: would take {size:,} bytes of the {free:,} that are free in {archives_folder()}; make "
            f"room, or set {CACHE_VARIABLE} to a folder of a larger disk"
        )
    yield from ((member, parts) for parts, member in found.items())
