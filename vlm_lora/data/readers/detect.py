"""What a path holds: one of FORMATS, as the names of files tell, and what is in JSON files."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm_lora.data.origin import depend_on
from vlm_lora.data.readers import coco
from vlm_lora.data.readers.fields import SPLITS
from vlm_lora.data.readers.folders import (
    Twins,
    find_twins,
    has_sidecars,
    is_image_name,
    visible_files,
    why_no_classes,
)
from vlm_lora.data.readers.gather import Rows
from vlm_lora.data.readers.hub import read_saved
from vlm_lora.data.readers.labelstudio import flattened
from vlm_lora.data.readers.parquet import read_parquet
from vlm_lora.data.readers.rows import NAMES, SHAPES
from vlm_lora.data.readers.shards import read_tar
from vlm_lora.data.readers.tables import TOKEN, read_csv, read_json, read_jsonl, read_text, read_tokens
from vlm_lora.errors import DataError

FORMATS = {
    "imagefolder": "a folder with metadata.jsonl, metadata.csv or metadata.parquet: file_name, text",
    "sidecar": "a folder of images, each with a .txt or .caption file of the same name, beside it or in captions/",
    "classes": "folders of images, each named after what its images show",
    **{shape: f"{what} in .jsonl or .json" for shape, what in SHAPES.items()},
    "coco": "COCO captions: a .json of images and annotations",
    "vqav2": "VQAv2: a .json of questions and a .json of annotations",
    "csv": "rows under a header, .csv",
    "tsv": "rows under a header, .tsv",
    "parquet": "rows with images inside or beside, .parquet (one, or train-*.parquet)",
    "hub": "a data set of the Hugging Face hub: hf:owner/name, hf:owner/name:split, hf-stream:owner/name:split[:1000]",
    "webdataset": "uncompressed .tar shards: images, each with a .txt or .json of its name",
    "arrow": "a folder written by save_to_disk of `datasets`",
    "flickr": "Flickr8k's or Flickr30k's .token file: lines of 1000.jpg#0, a tab, a caption",
}
READERS = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".tar": read_tar,
    ".token": read_tokens,
}
"""What gives the rows of a file, by its suffix: `reader(path, its name for messages)`."""
SUFFIX_OF = {"csv": ".csv", "tsv": ".tsv", "parquet": ".parquet", "webdataset": ".tar", "flickr": ".token"}
"""Of the formats that are a kind of file, whatever the shape of its rows."""
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


@dataclass(frozen=True, slots=True)
class Layout:
    """What a path holds, and in which files."""

    format: str | None
    """One of FORMATS; None where the shape of the rows is yet to be seen."""
    root: Path
    """The folder that images may not leave."""
    files: tuple[Path, ...]
    """Those of rows; of a sidecar folder all files."""
    content: Any = None
    """Of COCO and VQAv2: what their JSON files hold."""
    unread: str = ""
    """What else is in the folder, and is left alone or held out."""
    folder: Path | None = None
    """Of images with captions or classes: the folder that was recognised, `root` or below it."""
    twins: Twins | None = None
    """Of a sidecar folder: where images and captions are, if apart."""
    held: tuple[tuple[str, "Layout"], ...] = ()
    """Other parts of the data in folders of their own: ("val" or "test", what it holds)."""

    def name_of(self, file: Path) -> str:
        """What messages call a file: its name below the root."""
        return file.relative_to(self.root).as_posix()

    def tables(self) -> Iterator[tuple[str, Rows]]:
        """Name and rows of each file."""
        if self.format == "arrow":
            names = [file.parent.relative_to(self.root.parent).as_posix() for file in self.files]
            yield from ((name, read_saved(file.parent, name)) for name, file in zip(names, self.files, strict=True))
            return
        for file in self.files:
            suffix = SUFFIX_OF.get(self.format or "", file.suffix.lower())
            yield self.name_of(file), flattened(READERS[suffix](file, self.name_of(file)))


def detect(path: Path, format: str | None) -> Layout:
    """What the folder or file holds. Raises DataError where nothing is recognised, or more than one thing.

    A folder is read as what it holds itself; where it has a `train/` and no data of its own, as that. Files of rows
    are also looked for in `data/` and `annotations/`; sidecar folders are read with all that is below them, linked
    folders left out. `path` is resolved.
    """
    if path.is_dir():
        return _in_folder(path, path, format)
    above = path.parent  # COCO's own layout has images beside its folder of annotations
    return _in_file(path, above.parent if above.name == "annotations" else above, format)


def _in_folder(folder: Path, root: Path, format: str | None) -> Layout:
    if format in (None, "arrow") and (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return Layout("arrow", root, (folder / "state.json",))
    if format in (None, "arrow") and (folder / "dataset_dict.json").is_file():
        return _in_parts(folder, root, format)
    files = visible_files(folder, below=False)
    metadata = [file for file in files if file.name in METADATA and file.is_file()]
    if metadata and format in (None, "imagefolder"):
        if len(metadata) > 1:
            raise DataError(f"{folder.name}: holds {' and '.join(file.name for file in metadata)}; keep one")
        return Layout("imagefolder", root, (metadata[0],))
    data_files, others = _data_files(folder, format)
    sidecars = has_sidecars(files)
    if not data_files and not sidecars and format != "sidecar" and (folder / "train").is_dir():
        return _in_parts(folder, root, format)
    twins = find_twins(folder)
    if not data_files:
        files = visible_files(folder)
        sidecars = has_sidecars(files, twins)
    if data_files and sidecars and format is None:
        raise DataError(
            f"{folder.name}: holds images with captions, and {data_files[0].name}; pass --format sidecar "
            "for the one, or the file itself for the other"
        )
    if data_files:
        layout = _in_file(data_files[0], root, format)
        return replace(layout, files=tuple(data_files), unread=_unread(data_files[0], others))
    if sidecars and format in (None, "sidecar"):
        read = [file for file in files if not twins or any(map(file.is_relative_to, twins))]
        others = sorted(set(files).difference(read))
        if not twins or has_sidecars(others) or not has_sidecars(files, twins):
            return Layout("sidecar", root, tuple(files), folder=folder, twins=twins)
        left = sorted({folder / file.relative_to(folder).parts[0] for file in others})
        return Layout("sidecar", root, tuple(read), folder=folder, twins=twins, unread=_unread(twins.images, left))
    images = sum(map(is_image_name, files))
    why_not = why_no_classes(folder, files)
    below = any(file.parent != folder and is_image_name(file) for file in files)
    if below and (format == "classes" or (format is None and not why_not)):
        return Layout("classes", root, tuple(files), folder=folder)
    expected = f"{format}: {FORMATS[format]}" if format else "a caption beside each image (cat.txt beside cat.jpg)"
    expected += "" if format else ", a metadata.jsonl, or a file of rows; docs/data.md shows all formats"
    named = f" (the names of folders are not taken for captions, as {why_not}; --format classes does)" if below else ""
    inside = [file.name for file in files if file.suffix.lower() == ".zip"]
    named += f"; to read {inside[0]!r}, pass it itself" if inside else ""
    found = f"nothing recognised among {len(files)} files ({images} images){named}"
    raise DataError(f"{str(folder)!r}: {found}; expected {expected}")


def _in_parts(folder: Path, root: Path, format: str | None) -> Layout:
    """A folder with `train/`, perhaps `val/` and `test/` beside it: these are held out, if they can be read."""
    beside = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    beside = [path for path in beside if not path.name.startswith((".", "__"))]
    only = beside if len(beside) == 1 and SPLITS.get(beside[0].name.lower()) not in ("val", "test") else []
    train = [path for path in beside if path.name == "train"] or only
    if not train:
        names = ", ".join(f"{path.name}/" for path in beside)
        raise DataError(f"{folder.name}: holds {names or 'no folder of rows'}, and no train/; pass the one you mean")
    layout = _in_folder(train[0], root, format)
    held, taken = [], []
    for part in ("val", "test"):
        found = [path for path in beside if path not in train and SPLITS.get(path.name.lower()) == part]
        if len(found) == 1:
            with suppress(DataError):  # a test set may have no answers: it is named as unread
                held.append((part, _in_folder(found[0], root, format)))
                taken += found
    left = [path for path in beside if path not in (*train, *taken)]
    return replace(layout, held=tuple(held), unread=layout.unread or _unread(train[0], left, taken))


def _unread(taken: Path, others: list[Path], held: Sequence[Path] = ()) -> str:
    if not others and not held:
        return ""
    names = [f"{path.name}/" if path.is_dir() else path.name for path in others]
    more = f" and {len(others) - 8} more" if len(others) > 8 else ""
    said = [f"{taken.name}/ is read" if taken.is_dir() else f"{taken.name} is read"]
    said += [f"held out: {', '.join(f'{path.name}/' for path in held)}"] if held else []
    said += [f"left unread: {', '.join(names[:8])}{more}"] if others else []
    return ", ".join(said)


def _data_files(folder: Path, format: str | None) -> tuple[list[Path], list[Path]]:
    """The file of rows that is meant, or all shards of one table; and the files of rows that are not.

    Raises DataError if in doubt.
    """
    if format in ("sidecar", "imagefolder", "classes", "arrow"):
        return [], []
    suffixes = [SUFFIX_OF[format]] if format in SUFFIX_OF else [".json"] if format in ("coco", "vqav2") else READERS
    for place in (folder, folder / "data", folder / "annotations"):
        files = visible_files(place, below=False) if place.is_dir() else []
        files = [f for f in files if (f.suffix.lower() in suffixes or _of_flickr(f)) and f.is_file()]
        every = files = [f for f in files if not f.stem.startswith("dataset_info")]  # `datasets` puts it beside data
        if not any("question" in f.stem.lower() for f in files):
            files = _with_word("caption", files)  # captions_train2017.json, not instances_train2017.json
        elif format == "vqav2":
            files = [f for f in files if re.search("question|annotation", f.stem.lower())]
        files = _with_word("train", files)  # train.jsonl, not test.jsonl
        if len(files) == 2 and coco.find_partner(files[0], files):
            return files[:1], [f for f in every if f not in files]
        tables = {re.sub(r"\d+(-of-\d+)?", "", f.name) for f in files}
        if len(files) > 1 and (len(tables) > 1 or files[0].suffix.lower() not in (".parquet", ".tar")):
            names = ", ".join(f.name for f in files[:8])
            raise DataError(f"{folder.name}: holds {len(files)} files of rows ({names}); pass the one you mean")
        if files:
            return files, [f for f in every if f not in files]
    return [], []


def _of_flickr(path: Path) -> str:
    """ "csv" for Kaggle's Flickr8k, which has its CSV in a captions.txt; "flickr" for a .token.txt; else ""."""
    if not path.name.lower().endswith(("captions.txt", ".token.txt", ".token")) or not path.is_file():
        return ""
    depend_on(path)
    with path.open("rb") as file:
        head = file.readline(4096).decode("utf-8-sig", "replace")
    if TOKEN.match(head):
        return "flickr"
    names = {name.strip() for name in re.split(r"[,;|\t]", head)}
    is_table = path.name.lower() == "captions.txt" and all(names & set(NAMES[what]) for what in ("image", "caption"))
    return "csv" if is_table else ""


def _with_word(word: str, files: list[Path]) -> list[Path]:
    """Those of `files` with the word in their name, or all if there are none."""
    return [f for f in files if re.search(rf"(?<![a-z]){word}s?(?![a-z])", f.stem.lower())] or files


def _in_file(path: Path, root: Path, format: str | None) -> Layout:
    suffix = path.suffix.lower()
    if format in ("imagefolder", "sidecar", "classes", "arrow"):
        raise DataError(f"{path.name}: --format {format} needs a folder; pass the one that holds this file")
    kind = format or _of_flickr(path) or next((name for name in SUFFIX_OF if SUFFIX_OF[name] == suffix), None)
    if kind in SUFFIX_OF:
        return Layout(kind, root, (path,))
    if format in (None, "coco", "vqav2") and suffix == ".json":
        content = _peek(path)
        if coco.is_coco(content) and format != "vqav2":
            return Layout("coco", root, (path,), content)
        if (coco.is_questions(content) or coco.is_answers(content)) and format != "coco":
            return Layout("vqav2", root, (path,), _vqa_pair(path, content))
    if format in ("coco", "vqav2"):
        raise DataError(f"{path.name}: is not {FORMATS[format]}")
    if suffix not in READERS:
        raise DataError(f"{path.name}: expected a folder or one of {', '.join(READERS)}")
    return Layout(format, root, (path,))


def _vqa_pair(path: Path, content: dict) -> tuple[dict, dict]:
    """What VQAv2's two files hold, questions and annotations, from either of them."""
    beside = [file for file in visible_files(path.parent, below=False) if file.suffix.lower() == ".json"]
    partner = coco.find_partner(path, [file for file in beside if file.is_file()])
    other = _peek(partner) if partner else None
    questions, answers = (content, other) if coco.is_questions(content) else (other, content)
    if coco.is_questions(questions) and coco.is_answers(answers):
        return questions, answers
    missing = "annotations" if coco.is_questions(content) else "questions"
    raise DataError(f"{path.name}: is half of VQAv2; expected the {missing} of the same set beside it")


def _peek(path: Path) -> Any:
    """The value of a JSON file, None where it is no whole object: `tables` then reads it row by row."""
    text = read_text(path, path.name)
    try:
        return json.loads(text) if text.lstrip().startswith("{") else None
    except (ValueError, RecursionError):
        return None
