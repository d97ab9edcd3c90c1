"""A data set as it was read, kept on disk for later runs, which then read no row.

What is kept is used while everything that was read, listed or looked for in vain is as it was (`origin`), the settings
are the same, and so is the code that decides what a row means. Else, or where it is damaged, rows are read again. It is
mapped into memory, so all processes of a machine share it.
"""

import json
import mmap
import os
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

import numpy as np
import PIL

from vlm_lora.data.example import FilePart
from vlm_lora.data.examples import WIDTH, Columns, Examples
from vlm_lora.data.images import decoding_limit
from vlm_lora.data.index import index_folder, key_of, locked, rewritten
from vlm_lora.data.origin import Origin, is_unchanged, noting
from vlm_lora.data.readers.gather import BadRow, Dataset
from vlm_lora.data.readers.parquet import ParquetCell

MAGIC = b"vlm-lora rows 1\n"
SIDES = ("examples", "val", "test")
ARRAYS = ("head_ends", "said_ends", "order", "first")
WITHIN = (FilePart, ParquetCell)
"""What reads an image out of another file, by a name in the index."""
DECIDING = ("archives", "example", "examples", "images", "locate", "origin", "texts")
"""Modules of `data/` that decide what a row means, beside the readers."""
FRESH_SECONDS = 2
"""What changed so shortly before it was read is not kept: it may change again, and its time stay the same."""


def kept_dataset(name: object, read: Callable[[], Dataset], warn: Callable[[str], None]) -> Dataset:
    """What ``read`` gives, as it is kept under this name or else now. One process at a time reads.

    Args:
        name: of the data and of all that decides how it is read, but for the code.
        warn: called with a sentence where it cannot be kept.
    """
    here = Path(__file__).parent
    files = (*sorted(here.glob("*.py")), *(here.parent / f"{each}.py" for each in DECIDING))
    decide = name, [file.read_bytes() for file in files], sys.version, PIL.__version__, decoding_limit()
    path = index_folder() / f"rows-{key_of(*decide).hex()}.rows"
    if found := _load(path):
        return found
    with locked(path):
        if found := _load(path):
            return found
        started = time.time()
        with noting() as origin:
            dataset = read()
        if origin.newest > 1e9 * (started - FRESH_SECONDS):
            return dataset
        try:
            _save(path, dataset, origin)
        except TypeError:  # the images lie in what is no file of its own
            return dataset
        except OSError as error:
            warn(f"what was read is not kept for later runs: {error}")
            return dataset
        return _load(path) or dataset


def _save(path: Path, dataset: Dataset, origin: Origin) -> None:
    """Raises OSError; TypeError where it holds more than texts, numbers and names of files."""
    _ = dataset.fingerprint(), dataset.boxes  # which stay with the examples as facts
    arrays = {"paths": np.frombuffer(origin.paths, np.uint8), "states": np.array(origin.states)}
    told = {each: getattr(dataset, each) for each in ("format", "note", "unread", "unused", "parts")}
    told["bad"] = list(map(astuple, dataset.bad))
    for side in SIDES:
        examples = Examples.of(getattr(dataset, side))
        columns = examples.columns
        told[side] = {"facts": examples.facts, "shared": list(map(_plain, columns.shared)), "system": columns.system}
        arrays |= {f"{side}.{each}": np.frombuffer(getattr(columns, each), np.uint8) for each in ("heads", "said")}
        arrays[f"{side}.digests"] = columns.digests.reshape(-1)
        arrays |= {f"{side}.{each}": getattr(columns, each) for each in ARRAYS}
    told["arrays"] = [(name, array.dtype.str, array.nbytes) for name, array in arrays.items()]
    head = json.dumps(told).encode()
    parts = [len(head).to_bytes(8, "little")]
    for part in (head, *(array.data for array in arrays.values())):
        parts += [part, bytes(-memoryview(part).nbytes % 8)]
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    with rewritten(path) as file:
        file.writelines([MAGIC, checksum.to_bytes(8, "little"), *parts])


def _load(path: Path) -> Dataset | None:
    """What is there, if it is whole and of data that are as they were."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        with path.open("rb") as file:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        start = len(MAGIC) + 8
        expected = MAGIC + zlib.crc32(content[start:]).to_bytes(8, "little")
        if content[:start] != expected:
            return None
        start, size = start + 8, int.from_bytes(content[start : start + 8], "little")
        told, start = json.loads(bytes(content[start : start + size])), start + size + -size % 8
        arrays = {}
        for name, dtype, size in told.pop("arrays"):
            arrays[name] = np.frombuffer(content[start : start + size], dtype)
            start += size + -size % 8
        if not is_unchanged(arrays["paths"].data, arrays["states"].reshape(-1, 3)):
            return None
        sides = {}
        for side in SIDES:
            texts = {each: arrays[f"{side}.{each}"].data for each in ("heads", "said")}
            numbers = {each: arrays[f"{side}.{each}"] for each in ARRAYS}
            numbers["digests"] = arrays[f"{side}.digests"].reshape(-1, WIDTH)
            kept = told.pop(side)
            shared = list(map(_made, kept["shared"]))
            sides[side] = Examples(Columns(**texts, **numbers, shared=shared, system=kept["system"]))
            sides[side].facts.update(kept["facts"])
        bad, parts = (BadRow(*row) for row in told.pop("bad")), told.pop("parts")
        os.utime(path)
        return Dataset(**told, **sides, bad=tuple(bad), parts=tuple(parts))
    return None


def _plain(value: object) -> "str | list[str]":
    """One of the values that examples share, as JSON has it."""
    if value in WITHIN:
        return ["class", value.__name__]
    if isinstance(value, Path):
        return ["path", str(value)]
    if isinstance(value, str):
        return value
    raise TypeError(f"{type(value).__name__} cannot be kept")


def _made(value: "str | list[str]") -> object:
    if isinstance(value, str):
        return value
    kind, name = value
    return Path(name) if kind == "path" else {each.__name__: each for each in WITHIN}[name]
