"""Pictures on disk for the tests of the readers: small, all different, made on the spot."""

import hashlib
import json
from pathlib import Path

import pytest
from PIL import Image

from vlm_lora.data.readers import read_dataset


@pytest.fixture
def pictures(tmp_path):
    """`pictures("a.png", "b/c.jpg")` writes a small picture under each name, gives the folder."""

    def write(*names: str, into: str = ".") -> Path:
        for name in names:
            path = tmp_path / into / name
            path.parent.mkdir(parents=True, exist_ok=True)
            red, green, blue = hashlib.sha256(path.stem.encode()).digest()[:3]
            Image.new("RGB", (8, 6), (red, green, blue)).save(path)
        return tmp_path / into

    return write


@pytest.fixture
def read(pictures):
    """`read(row, ...)`: what these rows of one file are read as."""

    def read(*rows, **options):
        folder = pictures("a.png", "b.png", "c.png")
        (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return read_dataset(folder / "x.jsonl", prompt="Describe this image.", **options)

    return read
