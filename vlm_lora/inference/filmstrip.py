"""What a run that was watched said of its held-out pictures, from step to step."""

import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

NAMES = ("example", "image", "question", "reference")
COLUMNS = 8
"""Steps that are shown at most."""


@dataclass(frozen=True, slots=True)
class Film:
    """One held-out picture, what is asked and what the data says of it, and by step what the model said."""

    example: str
    image: str
    question: str
    reference: str
    captions: dict[int, str] = field(default_factory=dict)


def read_filmstrip(run: Path) -> list[Film]:
    """The pictures that were watched, from a run folder's ``metrics.jsonl``; none without the file. A line that was cut
    off is passed over."""
    films: dict[tuple[str, str], Film] = {}
    file = run / "metrics.jsonl"
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n") if file.is_file() else ():
        if '"watched"' not in line:
            continue
        try:
            row = json.loads(line)
            for said in row["watched"]:
                example, image, question, reference = (str(said[name]) for name in NAMES)
                film = films.setdefault((example, question), Film(example, image, question, reference))
                film.captions[int(row["step"])] = str(said["caption"])
        except (ValueError, TypeError, KeyError):
            continue
    return list(films.values())


def steps_shown(films: list[Film]) -> list[int]:
    """The steps to show, at most `COLUMNS`: the first, the last, and evenly those between at which any caption is
    another one than before."""
    steps = sorted({step for film in films for step in film.captions})
    news = steps[:1] + [
        step
        for before, step in pairwise(steps)
        if any(film.captions.get(step) != film.captions.get(before) for film in films)
    ]
    if steps and news[-1] != steps[-1]:
        news.append(steps[-1])
    if len(news) <= COLUMNS:
        return news
    return [news[round(i * (len(news) - 1) / (COLUMNS - 1))] for i in range(COLUMNS)]
