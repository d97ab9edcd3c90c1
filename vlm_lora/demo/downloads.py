"""Captions of several pictures as files that are training data as they are."""

import csv
import io
import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from vlm_lora import ImageRef

FORMATS = {
    "JSONL": "captions.jsonl",
    "CSV": "captions.csv",
    "Zip of pictures and captions": "captions.zip",
}
BESIDE = ("JSONL", "CSV")
"""Those that are put beside the pictures, and name them."""


def unlike(names: Sequence[str], stems: bool = False) -> list[str]:
    """The names; where two are alike, the later one with a number. With ``stems``, ones that would share a sidecar are
    alike too."""
    unique: dict[str, str] = {}
    for name in names:
        number, new = 1, name
        while (key := (Path(new).stem if stems else new).casefold()) in unique:
            number += 1
            new = f"{Path(name).stem}-{number}{Path(name).suffix}"
        unique[key] = new
    return list(unique.values())


def write_captions(kind: str, captions: Sequence[tuple[str, str, ImageRef]], folder: Path) -> Path:
    """One of `FORMATS`, from name, caption and picture of each."""
    file = folder / FORMATS[kind]
    if kind == "JSONL":
        rows = [json.dumps({"image": name, "caption": text}, ensure_ascii=False) for name, text, _ in captions]
        file.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    elif kind == "CSV":
        with file.open("w", encoding="utf-8", newline="") as target:
            csv.writer(target).writerows([("image", "caption"), *((name, text) for name, text, _ in captions)])
    else:
        names = unlike([_with_suffix(name, picture) for name, _, picture in captions], stems=True)
        with zipfile.ZipFile(file, "w") as target:  # stored: pictures are compressed already
            for name, (_, text, picture) in zip(names, captions, strict=True):
                target.writestr(name, picture.read_bytes())
                target.writestr(re.sub(r"\.[^.]*$", "", name) + ".txt", text + "\n")
    return file


def _with_suffix(name: str, picture: ImageRef) -> str:
    """Unpacked, a picture whose name has none would not be taken for one."""
    if Path(name).suffix:
        return name
    with Image.open(io.BytesIO(picture.read_bytes())) as image:
        return f"{name}.{(image.format or 'png').lower()}"
