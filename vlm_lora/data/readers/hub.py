"""Data sets of the Hugging Face hub, through `datasets`: its rows, images where they lie in its cache.

`hf-stream:` downloads no more than the rows that are asked for, and keeps their images for as long as the process
lives: `hf-stream:owner/name:train[:1000]` is the beginning of a data set that would not fit on the disk.

No code of a data set is run: `datasets` has dropped that from version 4 on. A row that names a file of this
machine or a URL instead of holding an image is refused like any other.
"""

import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from vlm_lora.data.example import MAX_FILE_BYTES, ImageRef
from vlm_lora.data.fetch import keep
from vlm_lora.data.locate import Finder, is_web_address
from vlm_lora.data.readers.gather import BadRow, Row, Rows
from vlm_lora.data.readers.parquet import Make, class_names, image_bytes, image_in_cell, images_in, named_classes
from vlm_lora.data.readers.tables import first_line
from vlm_lora.errors import DataError

_PART = r"[A-Za-z0-9][\w.-]*"
_STREAM = "hf-stream:"
_SLICE = re.compile(r"([^\[]+)(?:\[(\d*):(\d*)\])?")
_NAME = re.compile(rf"({_PART}/{_PART})(?:/({_PART}))?(?::(.+))?")


@dataclass(frozen=True, slots=True)
class HubCell:
    """An image in one cell of a data set that `datasets` has loaded (and maps from its cache on disk)."""

    table: Any = field(compare=False, repr=False)
    name: str
    row: int
    column: str
    item: int | None = None
    """Index where the cell is a list of images."""

    def read(self) -> bytes:
        cell = self.table[self.row : self.row + 1].column(self.column)[0].as_py()
        return image_bytes(cell, self.item)


def is_hub_name(path: str) -> bool:
    """Whether this means a data set of the hub: `hf:` or `hf-stream:`, or an `owner/name` that is no local path."""
    if path.startswith(("hf:", _STREAM)):
        return True
    if Path(path).exists() or Path(path).parent.is_dir():  # the second: a name below a folder that is here
        return False
    return re.fullmatch(rf"{_PART}/{_PART}", path) is not None


def is_saved(path: str) -> bool:
    """Whether `datasets` has written the folder, with save_to_disk."""
    return any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def read_hub(path: str) -> tuple[str, Rows]:
    """Name for messages and rows of `[hf:]owner/name[/config][:split]`, the split being "train" if left out.

    After `hf-stream:` a slice of the split is two numbers of rows, `train[100:200]`.

    Raises DataError where the hub cannot be reached or does not have it.
    """
    stream = path.startswith(_STREAM)
    match = _NAME.fullmatch(path.removeprefix(_STREAM if stream else "hf:"))
    if not match:
        raise DataError(f"{path!r}: expected hf:owner/name, hf:owner/name/config or hf:owner/name:split")
    name, config, split = match[1], match[2], match[3] or "train"
    first, last = 0, None
    if stream:
        part = _SLICE.fullmatch(split)
        if not part:
            raise DataError(f"{path!r}: a part of a stream is counted in rows, as in {_STREAM}{name}:train[:1000]")
        split, first, last = part[1], int(part[2] or 0), int(part[3]) if part[3] else None
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its warning of every retry; what was wrong is in the error
    bare = not path.startswith(("hf:", _STREAM))
    options: dict[str, Any] = {"streaming": True} if stream else {}
    try:
        if bare:  # most often a folder whose name is not quite right: said at once, not after many tries
            HfApi().dataset_info(name, timeout=5)
        table = datasets.load_dataset(name, config, split=split, **options)
    except Exception as error:  # of `datasets`, `huggingface_hub`, the HTTP client, pyarrow: no common base
        what = f"the hub gave no data set {name!r}"
        how = "check the name and the network, or download it and give its folder"
        if bare:
            what = "there is no such folder or file, and the hub gave no data set of this name"
            how = f"check the name, or say hf:{name} if it is in the cache of the hub"
        raise DataError(f"{path!r}: {what}: {first_line(error)}; {how}") from None
    if stream and isinstance(table, datasets.IterableDataset):
        table = table.skip(first)
        table = table if last is None else table.take(max(0, last - first))
        # Without known features nothing is decoded, and there is no way to say that nothing should be
        rows = table.decode(False) if table.features else table
        rows = (named_classes(values, _classes(table)) for values in rows)
        # A stream cannot be read again: its images are kept
        return name, _rows(rows, name, lambda row: lambda column, item, data, name: keep(data, name))
    if not isinstance(table, datasets.Dataset):
        raise DataError(f"{path!r}: expected one split, found {', '.join(table)}; say hf:{name}:SPLIT")
    classes = _classes(table)
    table = table.with_format("arrow")  # as stored: an image in it is bytes, not decoded
    place = Path(table.cache_files[0]["filename"]) if table.cache_files else Path(name)
    rows = (values for batch in table.iter(batch_size=64) for values in cast(Any, batch).to_pylist())
    rows = (named_classes(values, classes) for values in rows)
    return name, _rows(rows, name, lambda row: partial(image_in_cell, place, partial(HubCell, table, name, row)))


def read_saved(folder: Path, source: str) -> Rows:
    """Rows of what `datasets` wrote with save_to_disk; nothing of it is unpickled or run."""
    import datasets
    import pyarrow as pa

    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        for file in state["_data_files"]:
            if Path(file["filename"]).name != file["filename"] or (folder / file["filename"]).is_symlink():
                raise DataError(f"it names {file['filename']!r}, which is no file of this folder")
        table = datasets.Dataset.load_from_disk(str(folder))
        classes = _classes(table)
        table = table.with_format("arrow")
    except Exception as error:  # of `datasets`, pyarrow, the file system: no common base
        what = f"cannot be read as `datasets` saves it: {first_line(error)}"
        raise DataError(f"{source}: {what}; save it again") from None
    number = 0
    for batch in cast(Any, table.iter(batch_size=64)):
        try:
            batch.validate(full=True)  # damage in it would be read beyond its end
            rows, reason = batch.to_pylist(), ""
        except (pa.ArrowException, ValueError) as error:
            rows, reason = [{}] * batch.num_rows, f"cannot be read: {first_line(error)}; copy the folder again"
        for values in rows:
            number += 1
            make = partial(image_in_cell, folder / "state.json", partial(HubCell, table, source, number - 1))
            row = named_classes(images_in(values, f"{source}:{number}", make), classes)
            yield BadRow(source, number, reason) if reason else Row(source, number, row)


def _classes(table: Any) -> dict[str, list[str]]:
    return class_names(table.features.to_dict()) if table.features else {}


def _rows(rows: Iterable[dict], name: str, maker: Callable[[int], Make]) -> Rows:
    """`maker` gives what makes the images of a row, for `images_in`, by its index."""
    number = 0
    try:
        for values in rows:
            values = images_in(values, f"{name}:{number + 1}", maker(number))
            values = {column: _downloaded_in(value, name) for column, value in values.items()}
            number += 1
            yield Row(name, number, values)
    except Exception as error:  # the network, in the midst of it: no common base either
        reason = f"cannot be had from the hub: {first_line(error)}; nothing from here on is read"
        yield BadRow(name, number + 1, reason)


def _downloaded_in(value: Any, name: str) -> Any:
    """What names a downloaded file instead of holding its bytes, as the image in there."""
    if isinstance(value, list):
        return [_downloaded_in(v, name) for v in value]
    if isinstance(value, dict) and value.keys() == {"bytes", "path"} and value["bytes"] is None:
        return _downloaded(value["path"], name)
    return value


def _downloaded(path: object, name: str) -> Any:
    """The file that `datasets` has downloaded, or that lies beside the rows on the hub.

    A path anywhere else stays text, which is then refused.
    """
    if isinstance(path, str) and path.startswith(f"hf://datasets/{name}@"):
        from huggingface_hub import HfFileSystem

        with HfFileSystem().open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES)
        assert isinstance(data, bytes)
        return keep(data, path)
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    for folder in (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE):
        with suppress(DataError, OSError):
            return Finder(Path(folder).resolve()).find(path)
    return path


def find_in_row(value: Any, fetch: Callable[[str], ImageRef] | None = None) -> ImageRef:
    """For `rows.RowReader`: an image that the row holds. Raises DataError for a name of one."""
    if isinstance(value, ImageRef):
        return value
    if fetch and is_web_address(value):
        return fetch(value)
    raise DataError(
        f"holds no image but {type(value).__name__} {str(value)[:100]!r}, which is not fetched; "
        "expected a column of images, or download the data and give its folder"
        + (", or pass --allow-urls" if is_web_address(value) else "")
    )
