"""What is in a data set, and what is wrong with it: every image is decoded once, every text is read.

Knows neither tokens nor training: what it costs in tokens, `tokens` adds.
"""

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vlm_lora.check.images import Seen, look_at_all, near_duplicates
from vlm_lora.data.example import Example, ImageRef
from vlm_lora.data.readers import BadRow, Dataset, bad_rows
from vlm_lora.data.split import split_examples
from vlm_lora.data.texts import clean_text
from vlm_lora.errors import DataError
from vlm_lora.model.boxes import in_pixels

LISTED = 10
"""How many of a kind are listed; the count is always that of all."""


@dataclass(frozen=True, slots=True)
class Check:
    """What is in the data. `examples` and `held_out` are those that can be used: no image of theirs is bad."""

    dataset: Dataset
    examples: tuple[Example, ...]
    held_out: tuple[Example, ...]
    """Of the second data set, where there is one."""
    seen: dict[ImageRef, Seen]
    bad: tuple[BadRow, ...]
    duplicates: tuple[tuple[str, ...], ...]
    """Names of images with the same bytes."""
    near: tuple[tuple[str, str], ...]
    """Pairs of names."""
    near_cut: bool
    """Whether the search for `near`, and so for `leaks`, ended at MAX_PAIRS."""
    leaks: tuple[tuple[str, str], ...]
    """Pairs of images that are one or look alike, the first in training and the second held out."""
    cleaned: Counter[str]
    """How many texts `clean_text` changes, by the reason; under "texts" how many in all."""
    tokens: dict[str, Any] = field(default_factory=dict)
    """What it costs in tokens, where they were counted."""

    def facts(self) -> dict[str, Any]:
        """What `vlm-lora check --json` prints."""
        sizes = sorted((s.size for s in self.seen.values() if not s.error), key=math.prod)
        places = {"smallest": 0, "median": len(sizes) // 2, "largest": -1}
        dialogues = [in_pixels(dialogue) for example in self.examples for dialogue in example.dialogues]
        repeated = Counter(turn.assistant for dialogue in dialogues for turn in dialogue.turns)
        text_only = sum(len(example.dialogues) for example in self.examples if not example.images)
        # Named where there are some: what a reader of this did not know of stays as it was
        apart = {"unused": self.dataset.unused, "text_only": text_only, "boxes": self.dataset.boxes}
        return {name: value for name, value in apart.items() if value} | {
            "format": self.dataset.format,
            "columns": self.dataset.note,
            "unread": self.dataset.unread,
            "examples": len(self.examples),
            "images": len(sizes),
            "answers": len(dialogues),
            "sources": self.dataset.parts,
            "held_out": {"examples": len(self.held_out), "answers": sum(len(e.dialogues) for e in self.held_out)},
            "bad": [asdict(row) for row in self.bad],
            "answers_per_example": _spread(len(e.dialogues) for e in self.examples),
            "image_sizes": {name: sizes[at] for name, at in places.items()} if sizes else {},
            "several_frames": sum(look.several_frames for look in self.seen.values()),
            "duplicates": {"count": len(self.duplicates), "first": self.duplicates[:LISTED]},
            "near_duplicates": {"count": len(self.near), "first": self.near[:LISTED], "cut": self.near_cut},
            "leaks": {"count": len(self.leaks), "first": self.leaks[:LISTED]},
            "repeated": [[text, times] for text, times in repeated.most_common(LISTED) if times > 1],
            "scripts": scripts(turn.assistant for dialogue in dialogues for turn in dialogue.turns),
            "cleaning": dict(self.cleaned),
            "tokens": self.tokens,
        }


def check_dataset(
    dataset: Dataset,
    held_out: Dataset | None = None,
    *,
    val_split: float = 0.0,
    seed: int = 0,
    thumbnails: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Check:
    """Look at every image once, and at every text.

    Args:
        held_out: read it too, and say which of its images are in `dataset`, or look like one there.
        val_split: without `held_out`, say which near-duplicates `split_examples` would put on both sides.
        thumbnails: how many examples, spread evenly, keep a small copy of their image.
    """
    every = max(1, len(dataset.examples) // thumbnails) if thumbnails else 0
    shown = {ref for e in (dataset.examples[::every] if every else ()) for ref in e.images[:1]}
    both = (*dataset.examples, *(held_out.examples if held_out else ()))
    refs = list(dict.fromkeys(ref for e in both for ref in e.images))
    seen: dict[ImageRef, Seen] = {}
    for look in look_at_all(refs, shown):
        seen[look.ref] = look
        progress(len(seen), len(refs))
    bad = list(dataset.bad + (held_out.bad if held_out else ()))
    train, held, cleaned = [], [], Counter({"texts": 0})
    for number, example in enumerate(both):
        if error := next((seen[ref].error for ref in example.images if seen[ref].error), None):
            bad += bad_rows(example, error)
        else:
            (train if number < len(dataset.examples) else held).append(example)
            for text in _texts(example):
                reasons = clean_text(text)[1]
                cleaned.update(reasons)
                cleaned["texts"] += bool(reasons)
    looks = [look for look in seen.values() if not look.error]
    near, near_cut = near_duplicates(looks)
    sides = _split(train, seen, val_split, seed) if val_split and held_out is None else (train, held)
    leaks = _leaks(near, sides, seen)
    by_hash: dict[str, list[str]] = {}
    for look in looks:
        by_hash.setdefault(look.sha256, []).append(look.ref.name)
    return Check(
        dataset=dataset,
        examples=tuple(train),
        held_out=tuple(held),
        seen=seen,
        bad=tuple(bad),
        duplicates=tuple(tuple(names) for names in by_hash.values() if len(names) > 1),
        near=tuple((a.ref.name, b.ref.name) for a, b in near),
        near_cut=near_cut,
        leaks=tuple((a.ref.name, b.ref.name) for a, b in leaks),
        cleaned=cleaned,
    )


def _texts(example: Example) -> Iterator[str]:
    for dialogue in example.dialogues:
        for turn in dialogue.turns:
            yield from (turn.user, turn.assistant)
        yield from (*dialogue.accepted, *dialogue.refs)
        yield dialogue.system


def _split(
    examples: Sequence[Example], seen: dict[ImageRef, Seen], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    hashed = [  # so that the split reads no image a second time
        replace(e, images=tuple(replace(ref, sha256=seen[ref].sha256) for ref in e.images)) for e in examples
    ]
    held_ids = set()
    with suppress(DataError):  # all images are of one group, which no split parts
        held_ids = {example.id for example in split_examples(hashed, fraction, seed)[1]}
    return [e for e in examples if e.id not in held_ids], [e for e in examples if e.id in held_ids]


def _leaks(
    near: list[tuple[Seen, Seen]], sides: Sequence[Sequence[Example]], seen: dict[ImageRef, Seen]
) -> list[tuple[Seen, Seen]]:
    """Pairs (in training, held out): the same bytes, which a split of ours never has, then lookalikes."""
    train, held = ({seen[ref].sha256: seen[ref] for e in side for ref in e.images} for side in sides)
    pairs = [(train[key], held[key]) for key in held if key in train]
    for pair in near:
        pairs += [(a, b) for a, b in (pair, pair[::-1]) if a.sha256 in train and b.sha256 in held]
    return pairs


def scripts(texts: Iterable[str]) -> dict[str, float]:
    """Share of the letters by Unicode script ("latin", "cyrillic", "cjk"), the commonest first."""
    letters, by_script = Counter(), Counter()
    for text in texts:
        letters.update(text)
    for letter, times in letters.items():
        if letter.isalpha():
            # The standard library has no table of scripts; the first word of a letter's name is one
            by_script[unicodedata.name(letter, "other").split()[0].split("-")[0].lower()] += times
    return {script: round(times / by_script.total(), 4) for script, times in by_script.most_common()}


def _spread(numbers: Iterable[int]) -> dict[str, float]:
    ordered = sorted(numbers)
    if not ordered:
        return {}
    mean = round(sum(ordered) / len(ordered), 2)
    return {"least": ordered[0], "median": ordered[len(ordered) // 2], "most": ordered[-1], "mean": mean}
