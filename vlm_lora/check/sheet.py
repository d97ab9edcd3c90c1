"""The contact sheet of `vlm-lora check --html`: one file that loads nothing and runs nothing."""

import base64
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from vlm_lora.check.dataset import Check
from vlm_lora.data.example import Box, Example, ImageRef
from vlm_lora.errors import DataError
from vlm_lora.model.boxes import in_pixels

MAX_CARDS = 200
"""How many examples are shown, spread evenly over the data."""
MAX_TEXTS = 5
"""How many dialogues of each."""


def write_sheet(path: Path, check: Check, facts: dict[str, Any], *, title: str) -> None:
    """Write the pictures of `check` with their texts, below the figures and the bad rows of `facts`."""
    environment = Environment(autoescape=True, trim_blocks=True)
    environment.filters["thousands"] = "{:,}".format
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    environment.filters |= {"in_pixels": in_pixels, "boxes_of": _boxes_of, "drawn": _drawn}
    template = environment.from_string((files("vlm_lora.check") / "sheet.html").read_text(encoding="utf-8"))
    cards = [(example, [check.seen[ref] for ref in example.images]) for example in check.examples]
    cards = [card for card in cards if any(look.thumbnail for look in card[1])]
    page = template.render(title=title, facts=facts, cards=cards, max_texts=MAX_TEXTS)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8", errors="replace")  # a file name may hold half a surrogate pair
    except OSError as error:
        raise DataError(f"--html {path}: cannot be written: {error.strerror or error}") from error


def _boxes_of(example: Example, image: ImageRef) -> list[Box]:
    """The boxes in one of its images, of the dialogues that are shown."""
    boxes = (box for dialogue in example.dialogues[:MAX_TEXTS] for box in dialogue.boxes)
    return [box for box in boxes if example.images[box.image] == image]


def _drawn(box: Box) -> Markup:
    """The attributes of an element that lies on the picture where the box is."""
    x, y, *far = (100 * value / box.size[i % 2] for i, value in enumerate(box.points))
    style = f"left: {x:.2f}%; top: {y:.2f}%"
    if far:
        style += f"; width: {far[0] - x:.2f}%; height: {far[1] - y:.2f}%"
    told = ", ".join(f"{value:g}" for value in box.points)
    return Markup('title="{}" class="{}" style="{}"').format(told, "box" if far else "point", style)
