"""`read_dataset`: finds out what a folder or a file holds and yields Examples, gathered by image.

Each module here knows one family: `folders` (sidecars), `tables` (JSONL, JSON, CSV, Parquet: rows), `rows`
(what a row means), `shards` (WebDataset), `hub` (Hugging Face), `coco` (COCO captions, VQAv2). None decodes
an image: that it is a regular file inside of the data is all that is checked.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from vlm_lora.data.example import ImageRef
from vlm_lora.data.fetch import fetch_image
from vlm_lora.data.images import find_image, is_web_address, real_folder
from vlm_lora.data.readers import coco, folders, hub, shards, tables
from vlm_lora.data.readers.gather import BadRow, Dataset, Said, bad_row, bad_rows, below, gather, join
from vlm_lora.data.readers.rows import NAMES, SHAPES, RowReader, check_columns
from vlm_lora.errors import ConfigError, DataError

__all__ = ["FORMATS", "BadRow", "Dataset", "bad_row", "bad_rows", "below", "folder_of", "read_dataset"]

FORMATS = {
    "imagefolder": "a folder with metadata.jsonl, metadata.csv or metadata.parquet: file_name, text",
    "sidecar": "a folder of images, each with a .txt or .caption file of the same name",
    "messages": "rows {messages: [{role, content}], images} in .jsonl or .json",
    "conversations": "rows {conversations: [{from, value}], image} (ShareGPT, LLaVA) in .jsonl or .json",
    "query-response": "rows {query, response, images} in .jsonl or .json",
    "qa": "rows {image, question, answer or answers} in .jsonl or .json",
    "captions": "rows {image, caption or captions or text} in .jsonl or .json",
    "coco": "COCO captions: a .json of images and annotations",
    "vqav2": "VQAv2: a .json of questions and a .json of annotations",
    "csv": "rows under a header, .csv",
    "tsv": "rows under a header, .tsv",
    "parquet": "rows with images inside or beside, .parquet (one, or train-*.parquet)",
    "hub": "a data set of the Hugging Face hub: hf:owner/name, hf:owner/name:split, hf-stream:owner/name:split[:1000]",
    "webdataset": "uncompressed .tar shards: images, each with a .txt or .json of its name",
}
CONTAINERS = {"csv": ".csv", "tsv": ".tsv", "parquet": ".parquet", "webdataset": ".tar"}
MAX_WEIGHT = 1000
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
IMAGE_FOLDERS = ("images", "Images", "image", "imgs", "img", "pictures", "photos", "train", "val")
IMAGE_FOLDERS += ("train2014", "val2014", "train2017", "val2017", "flickr30k_images", "Flicker8k_Dataset")


def read_dataset(
    path: str | Path | Sequence[str | Path],
    *,
    format: str | None = None,
    prompt: str,
    columns: dict[str, str] | None = None,
    allow_outside: bool = False,
    allow_urls: bool = False,
    images: str | Path | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> Dataset:
    """All of `path`: a folder, a file, or a hub name (`hf:owner/name`, or `owner/name` that is no path).

    Or several of these, each perhaps with a weight behind it, `photos:2`: so often each of its answers is learnt
    from in an epoch, a whole number, so that none is left out and none is more by chance.

    The format is found out by looking where `format` is None.

    A folder is read as what it holds itself; where it has a `train/` and no data of its own, as that. What is
    left unread then is in `Dataset.unread`. Files
    of rows are also looked for in `data/` and `annotations/`; sidecar folders are read with all that is below
    them, links to folders left out.

    Args:
        prompt: The instruction that captions answer.
        columns: Our name (image, caption, question, answer, kind, ...) -> the data's, where that is unusual.
        allow_outside: Take images outside of the data's folder too (`..`, absolute names, symlinks).
        allow_urls: Download images that are named by an http:// or https:// address, one after the other.
        images: A folder where images are looked for that are not beside the data.
        progress: Called with the number of rows read of a source, at every row.

    Raises DataError where nothing is recognised, or more than one thing; ConfigError for an unknown format or
    key of `columns`. A bad row never raises: it becomes a BadRow.
    """
    columns = dict(columns or {})
    check_columns(columns)
    if format is not None and format not in FORMATS:
        raise ConfigError(f"--format {format}: unknown; expected one of {', '.join(FORMATS)}")
    sources = [path] if isinstance(path, str | Path) else list(path)
    weighed = [_weighed(source) for source in sources]
    places = [os.path.realpath(place) for place, _ in weighed]
    if twice := [place for number, (place, _) in enumerate(weighed) if places[number] in places[:number]]:
        raise ConfigError(f"{twice[0]!r} is given twice; to learn from it twice an epoch, say {twice[0]}:2")
    if images is not None and not Path(images).is_dir():
        raise ConfigError(f"--images {images}: there is no such folder; check the name")
    images = images and Path(images).resolve()
    how = _Reading(prompt, columns, allow_outside, fetch_image if allow_urls else None, images, progress)
    found = [_read(place, format, how) for place, _ in weighed]
    if len(found) == 1 and weighed[0][1] == 1:
        return found[0]
    return join((place, folder_of(place), weight, part) for (place, weight), part in zip(weighed, found, strict=True))


def _weighed(source: str | Path) -> tuple[str, int]:
    """`photos:2` as ("photos", 2); what is there under the whole name has no weight."""
    place, colon, weight = str(source).rpartition(":")
    if not colon or not re.fullmatch(r"-?[\d.]+", weight) or os.path.lexists(source):
        return str(source), 1
    if not weight.isdecimal() or not 1 <= int(weight) <= MAX_WEIGHT:
        raise ConfigError(
            f"{str(source)!r}: the weight is how often each answer is seen in an epoch, a whole number from 1 to "
            f"{MAX_WEIGHT}; found {weight}"
        )
    return place, int(weight)


def folder_of(place: str) -> str:
    """What goes in front of a source's names where there are several; a hub's rows are named by it already."""
    path = Path(place)
    return "" if hub.is_hub_name(place) else (path if path.is_dir() else path.parent).as_posix()


@dataclass
class _Reading:
    """How a source is read, the root that its images may not leave, where they are looked for."""

    prompt: str
    columns: dict[str, str]
    allow_outside: bool
    fetch: Callable[[str], ImageRef] | None
    images: Path | None
    progress: Callable[[int], None]
    root: Path = Path()
    folders: tuple[Path, ...] = ()
    found: dict[str, ImageRef] = field(init=False, default_factory=dict)
    asked: set[str] = field(init=False, default_factory=set)
    note: str = field(init=False, default="")
    unread: str = field(init=False, default="")

    def took(self, taken: Path, others: list[Path]) -> None:
        """Remember what else is in the folder."""
        if others:
            names = [f"{path.name}/" if path.is_dir() else path.name for path in (taken, *others)]
            more = f" and {len(others) - 8} more" if len(others) > 8 else ""
            self.unread = f"{names[0]} is read, left unread: {', '.join(names[1:9])}{more}"

    def look_beside(self, file: Path) -> None:
        """Look for images in the file's folder, in the root, and in `images/` and the like below these."""
        names = [file.stem, *re.findall(r"(?:train|val|test)\d*", file.stem), *IMAGE_FOLDERS]
        places = [file.parent, self.root]
        places += [place / name for place in places for name in names]
        self.folders = tuple(dict.fromkeys(p for p in places if p.is_dir()))

    def find(self, value: Any) -> ImageRef:
        if isinstance(value, ImageRef):  # embedded: the container's reader made it
            return value
        if isinstance(value, dict) and isinstance(value.get("path"), str):
            value = value["path"]
        if isinstance(value, str) and value in self.found:
            return self.found[value]
        if isinstance(value, str):
            self.asked.add(value)
        try:
            ref = find_image(value, self.root, self.folders, allow_outside=self.allow_outside, fetch=self.fetch)
        except DataError as error:
            if self.images is None or is_web_address(value):
                raise
            try:
                ref = find_image(value, self.images, allow_outside=self.allow_outside)
            except DataError:
                raise DataError(f"{error}; it is not in the folder of --images either") from None
        self.found[value] = ref
        return ref

    def name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def rows(self, path: Path, shape: str | None = None, kind: str | None = None) -> list[Said | BadRow]:
        """All rows of one file. Raises DataError where there are none, or none has a shape that we know."""
        source = self.name(path)
        is_tar = (kind or path.suffix.lower()) == ".tar"
        found = shards.read_tar(path, source) if is_tar else tables.read_table(path, source, kind)
        reader = RowReader(self.prompt, self.find, self.columns, shape)
        said, self.note = _understood(source, _counted(found, self.progress), reader)
        return said


def _read(path: str, format: str | None, how: _Reading) -> Dataset:
    if format in (None, "hub") and hub.is_hub_name(path):
        name, found = hub.read_hub(path)
        reader = RowReader(how.prompt, partial(hub.find_in_row, fetch=how.fetch), how.columns)
        said, note = _understood(name, _counted(found, how.progress), reader)
        return replace(gather("hub", said), note=note)
    path = Path(path)
    try:
        if not path.exists():
            raise DataError(f"{str(path)!r}: there is no such folder or file; check the name")
        path = path.resolve()
        if not path.is_dir() and not path.is_file():
            raise DataError(f"{path.name}: is not a regular file; expected a folder or one of {_suffixes()}")
        real_folder.cache_clear()
        root = path if path.is_dir() else path.parent
        if path.is_file() and root.name == "annotations":  # COCO's own layout has images beside it
            root = root.parent
        reading = replace(how, root=root, folders=(root,))
        dataset = (_read_folder if path.is_dir() else _read_file)(path, format, reading)
        return replace(dataset, note=reading.note, unread=reading.unread)
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}; check its permissions"
        raise DataError(f"{error.filename or path.name}: {reason}") from error


def _counted(rows: Iterable, progress: Callable[[int], None]) -> Iterator:
    for number, row in enumerate(rows, start=1):
        progress(number)
        yield row


def _understood(source: str, rows: tables.Rows, reader: RowReader) -> tuple[list[Said | BadRow], str]:
    """What all rows say, those of other shapes than the first too; and how the first one was understood.

    Raises DataError where there are no rows, or none has a shape that we know.
    """
    found: list[Said | BadRow] = []
    fields: dict[str, None] = {}
    note = ""
    for item in rows:
        if isinstance(item, BadRow):
            found.append(item)
            continue
        line, row = item
        found += reader.read(row, source, line)
        if not note and isinstance(row, dict):
            note = reader.guess(row)
            fields |= dict.fromkeys(row)
    known = "; ".join(f"{name}: {FORMATS[name].split(' in .')[0]}" for name in SHAPES)
    if not found:
        raise DataError(f"{source}: holds no rows; expected {known}")
    if not note:
        names = ", ".join(map(repr, list(fields)[:20]))
        what = f"their fields are {names}" if fields else f"the first one {found[0].reason}"
        raise DataError(
            f"{source}: none of {len(found)} rows is understood: {what}; "
            f"expected {known} (other names: --columns caption=NAME)"
        )
    return found, note


def _read_folder(folder: Path, format: str | None, reading: _Reading) -> Dataset:
    files = folders.visible_files(folder, below=False)
    metadata = [f for f in files if f.name in METADATA and f.is_file()]
    if metadata and format in (None, "imagefolder"):
        return _read_imagefolder(folder, metadata, reading)
    data_files, others = _data_files(folder, format)
    sidecars = folders.has_sidecars(files)
    if not data_files and not sidecars and format != "sidecar" and (folder / "train").is_dir():
        beside = (path for path in sorted(folder.iterdir()) if path.is_dir() and path.name != "train")
        reading.took(folder / "train", [path for path in beside if not path.name.startswith((".", "__"))])
        return _read_folder(folder / "train", format, reading)
    if not data_files:
        files = folders.visible_files(folder)
        sidecars = folders.has_sidecars(files)
    if data_files and sidecars and format is None:
        raise DataError(
            f"{folder.name}: holds images with captions, and {data_files[0].name}; pass --format sidecar "
            "for the one, or the file itself for the other"
        )
    if data_files:
        reading.took(data_files[0], others)
        reading.look_beside(data_files[0])
        if len(data_files) > 1:
            kind = next(name for name, suffix in CONTAINERS.items() if suffix == data_files[0].suffix.lower())
            return gather(kind, [said for file in data_files for said in reading.rows(file)])
        return _read_file(data_files[0], format, reading)
    if sidecars and format in (None, "sidecar"):
        said = folders.read_sidecars(reading.root, files, reading.prompt, allow_outside=reading.allow_outside)
        return gather("sidecar", _counted(said, reading.progress))
    images = sum(map(folders.is_image_name, files))
    known = "; ".join(f"{name}: {what}" for name, what in FORMATS.items() if format in (None, name))
    raise DataError(
        f"{str(folder)!r}: nothing recognised among {len(files)} files ({images} images); expected one of: {known}"
    )


def _read_imagefolder(folder: Path, metadata: list[Path], reading: _Reading) -> Dataset:
    if len(metadata) > 1:
        raise DataError(f"{folder.name}: holds {' and '.join(m.name for m in metadata)}; keep one")
    reading.folders = (folder,)
    said = reading.rows(metadata[0])
    known = {ref.path for ref in reading.found.values()}
    reason = f"no row of {metadata[0].name} names this image; add one, or remove it"
    uncovered = [
        BadRow(reading.name(path), None, reason)
        for path in folders.images_below(folder)  # the Hugging Face loader drops these without a word
        if path.relative_to(folder).as_posix() not in reading.asked and Path(os.path.realpath(path)) not in known
    ]
    return gather("imagefolder", said + uncovered)


def _data_files(folder: Path, format: str | None) -> tuple[list[Path], list[Path]]:
    """The file of rows that is meant, or all shards of one Parquet table; and the files of rows that are not.

    Raises DataError if in doubt.
    """
    if format in ("sidecar", "imagefolder"):
        return [], []
    if format in CONTAINERS:
        suffixes: tuple[str, ...] = (CONTAINERS[format],)
    else:
        suffixes = (".json",) if format in ("coco", "vqav2") else (*tables.SUFFIXES, ".tar")
    for place in (folder, folder / "data", folder / "annotations"):
        files = folders.visible_files(place, below=False) if place.is_dir() else []
        found = [f for f in files if (f.suffix.lower() in suffixes or _is_caption_table(f)) and f.is_file()]
        found = [f for f in found if not f.stem.startswith("dataset_info")]  # `datasets` puts it beside data
        every = found
        if not any("question" in f.stem.lower() for f in found):
            found = _with_word("caption", found)  # captions_train2017.json, not instances_train2017.json
        elif format == "vqav2":
            found = [f for f in found if re.search("question|annotation", f.stem.lower())]
        found = _with_word("train", found)  # train.jsonl, not test.jsonl
        if len(found) == 2 and coco.find_partner(found[0], found):
            return found[:1], [f for f in every if f not in found]
        tables_of = {re.sub(r"\d+(-of-\d+)?", "", f.name) for f in found}
        if len(found) > 1 and (len(tables_of) > 1 or found[0].suffix.lower() not in (".parquet", ".tar")):
            names = ", ".join(f.name for f in found[:8])
            raise DataError(f"{folder.name}: holds {len(found)} files of rows ({names}); pass the one you mean")
        if found:
            return found, [f for f in every if f not in found]
    return [], []


def _is_caption_table(path: Path) -> bool:
    """Kaggle's Flickr8k has its CSV in a captions.txt."""
    if path.name.lower() != "captions.txt" or not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.readline(4096).decode("utf-8-sig", "replace")
    names = {name.strip() for name in re.split(r"[,;|\t]", head)}
    return all(names & set(NAMES[what]) for what in ("image", "caption"))


def _with_word(word: str, files: list[Path]) -> list[Path]:
    """Those of `files` with the word in their name, or all if there are none."""
    return [f for f in files if re.search(rf"(?<![a-z]){word}s?(?![a-z])", f.stem.lower())] or files


def _read_file(path: Path, format: str | None, reading: _Reading) -> Dataset:
    reading.look_beside(path)
    suffix = path.suffix.lower()
    if format in ("imagefolder", "sidecar"):
        raise DataError(f"{path.name}: --format {format} needs a folder; pass the one that holds this file")
    container = format or next((name for name in CONTAINERS if CONTAINERS[name] == suffix), None)
    if container is None and _is_caption_table(path):
        container = "csv"
    if container in CONTAINERS:
        return gather(container, reading.rows(path, kind=CONTAINERS[container]))
    if format in (None, "coco", "vqav2") and suffix == ".json":
        data = _peek(path)
        if coco.is_coco(data) and format != "vqav2":
            rows = coco.read_coco(data, reading.name(path), reading.prompt, reading.find)
            return gather("coco", _counted(rows, reading.progress))
        if (coco.is_questions(data) or coco.is_answers(data)) and format != "coco":
            return gather("vqav2", _counted(_read_vqa(path, data, reading), reading.progress))
    if format in ("coco", "vqav2"):
        raise DataError(f"{path.name}: is not {FORMATS[format]}")
    if suffix not in tables.SUFFIXES:
        raise DataError(f"{path.name}: expected a folder or one of {_suffixes()}")
    said = reading.rows(path, shape=format)
    return gather(reading.note.partition(":")[0], said)


def _read_vqa(path: Path, data: Any, reading: _Reading) -> Iterator[Said | BadRow]:
    beside = [f for f in folders.visible_files(path.parent, below=False) if f.suffix.lower() == ".json"]
    partner = coco.find_partner(path, [f for f in beside if f.is_file()])
    other = _peek(partner) if partner else None
    questions, answers = (data, other) if coco.is_questions(data) else (other, data)
    if not coco.is_questions(questions) or not coco.is_answers(answers):
        missing = "annotations" if coco.is_questions(data) else "questions"
        raise DataError(f"{path.name}: is half of VQAv2; expected the {missing} of the same set beside it")
    return coco.read_vqa(questions, answers, reading.name(path), reading.find)


def _peek(path: Path) -> Any:
    """The value of a JSON file, None where it is no whole object: `tables` then reads it row by row."""
    text = tables.read_text(path, path.name)
    try:
        return json.loads(text) if text.lstrip().startswith("{") else None
    except (ValueError, RecursionError):
        return None


def _suffixes() -> str:
    return ", ".join((*tables.SUFFIXES, ".tar"))
