"""The contact sheet of `vlm-lora check --html`: one file that loads nothing and runs nothing."""

import base64
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment

from vlm_lora.check.dataset import Check
from vlm_lora.errors import DataError

MAX_CARDS = 200
"""How many examples are shown, spread evenly over the data."""
MAX_TEXTS = 5
"""How many dialogues of each."""


def write_sheet(path: Path, check: Check, facts: dict[str, Any], *, title: str) -> None:
    """Write the pictures of `check` with their texts, below the figures and the bad rows of `facts`."""
    environment = Environment(autoescape=True, trim_blocks=True)
    environment.filters["thousands"] = "{:,}".format
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    template = environment.from_string((files("vlm_lora.check") / "sheet.html").read_text(encoding="utf-8"))
    cards = [(example, [check.seen[ref] for ref in example.images]) for example in check.examples]
    cards = [card for card in cards if any(look.thumbnail for look in card[1])]
    page = template.render(title=title, facts=facts, cards=cards, max_texts=MAX_TEXTS)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8", errors="replace")  # a file name may hold half a surrogate pair
    except OSError as error:
        raise DataError(f"--html {path}: cannot be written: {error.strerror or error}") from error
