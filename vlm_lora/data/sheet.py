"""The contact sheet of `vlm-lora check --html`: one file without a script; every text is escaped."""

import base64
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from vlm_lora.data.check import Check, Seen
from vlm_lora.errors import DataError

MAX_CARDS = 200
"""So many examples are shown, spread evenly over the data."""
MAX_TEXTS = 5
"""So many dialogues of each."""


def write_sheet(path: Path, check: Check, facts: dict[str, Any], *, title: str) -> None:
    """Write the pictures of `check` with their texts, below the figures and the bad rows of `facts`."""
    counts = f"{facts['examples']:,} examples, {facts['images']:,} images, {facts['answers']:,} answers"
    bad = "".join(
        f"<tr><td>{escape(row['source'])}<td>{row['line'] or ''}<td>{escape(row['reason'])}" for row in facts["bad"]
    )
    cards = list(_cards(check))
    body = [
        f"<h1>{escape(title)}</h1><p>{escape(facts['format'])}: {counts}; {len(cards):,} shown.</p>",
        f"<h2>{len(facts['bad']):,} bad rows</h2><table>{bad}</table>" if bad else "<p>Every row can be used.</p>",
        f"<main>{''.join(cards)}</main>",
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        page = PAGE.format(title=escape(title), style=STYLE, body="\n".join(body))
        path.write_text(page, encoding="utf-8", errors="replace")  # a file name may hold half a surrogate pair
    except OSError as error:
        raise DataError(f"--html {path}: cannot be written: {error.strerror or error}") from error


def _cards(check: Check) -> Iterator[str]:
    for example in check.examples:
        looks = [check.seen[ref] for ref in example.images]
        pictures = "".join(_picture(look) for look in looks if look.thumbnail)
        if not pictures:
            continue
        texts = []
        for dialogue in example.dialogues[:MAX_TEXTS]:
            turns = (f"<q>{escape(turn.user)}</q> {escape(turn.assistant)}" for turn in dialogue.turns)
            texts.append(f"<p>{'<br>'.join(turns)}</p>")
        more = len(example.dialogues) - MAX_TEXTS
        rest = f"<p>and {more:,} more</p>" if more > 0 else ""
        sizes = ", ".join(f"{look.size[0]}x{look.size[1]}" for look in looks)
        name = f"<b>{escape(example.id)}</b> <small>{sizes}, {escape(example.source)}</small>"
        yield f"<article>{pictures}<div>{name}{''.join(texts)}{rest}</div></article>"


def _picture(look: Seen) -> str:
    data = base64.b64encode(look.thumbnail).decode()
    return f'<img alt="{escape(look.ref.name)}" src="data:image/jpeg;base64,{data}">'


HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
"""
"""How each page of ours begins: it loads nothing and runs nothing."""

STYLE = """body { font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem; overflow-wrap: anywhere }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(22rem, 1fr)); gap: 1rem }
article { display: flex; gap: .8rem; border: 1px solid #8886; border-radius: 6px; padding: .6rem }
img { max-width: 160px; align-self: start }
p { margin: .3rem 0; white-space: pre-line }
q, small { opacity: .7 }
td { padding: 0 .8rem .2rem 0; vertical-align: top }
"""
PAGE = (
    HEAD
    + """<body>
{body}
</body>
</html>
"""
)
