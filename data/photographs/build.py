"""Cuts squares out of the nine photographs beside this file and writes a caption beside each.

python data/photographs/build.py OUT

OUT gets ``photos`` (30 squares of each photograph, with captions) and ``more`` (2 of each, without).
"""

import random
import sys
from pathlib import Path

from PIL import Image

ORIGINALS = Path(__file__).parent / "originals"
CAPTIONS = {
    "astronaut": "An astronaut in an orange suit smiles at you.",
    "bricks": "A wall of bricks.",
    "cat": "A tabby cat with green eyes.",
    "coffee": "A cup of coffee stands on a wooden table, a spoon beside it.",
    "coins": "Old coins lie in rows on a dark cloth.",
    "galaxies": "Galaxies in all colours shine in the black sky.",
    "gravel": "Grey gravel, seen from above.",
    "photographer": "A man in a dark coat looks through a camera on a tripod.",
    "rocket": "A white rocket stands on its launch pad at dusk.",
}
SQUARES, MORE, SIDE = 30, 2, 320


def square(photograph: Image.Image, drawn: random.Random) -> Image.Image:
    """A part of half to nearly all of its shorter side, anywhere in it."""
    side = int(min(photograph.size) * drawn.uniform(0.5, 0.95))
    left, top = drawn.randint(0, photograph.width - side), drawn.randint(0, photograph.height - side)
    return photograph.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def main(out: Path) -> None:
    drawn = random.Random(0)
    for folder, count in (("photos", SQUARES), ("more", MORE)):
        (out / folder).mkdir(parents=True)
        for name, caption in CAPTIONS.items():
            photograph = Image.open(ORIGINALS / f"{name}.jpg").convert("RGB")
            for number in range(1, count + 1):
                file = out / folder / f"{name}-{number:02}.jpg"
                square(photograph, drawn).save(file, quality=88)
                if folder == "photos":
                    file.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
