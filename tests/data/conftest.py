"""Pictures on disk for the tests of the readers: small, all different, made on the spot."""

import hashlib
from pathlib import Path

import pytest
from PIL import Image


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
