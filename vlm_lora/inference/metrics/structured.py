"""Scores of answers that are JSON, field by field.

A field is a path to a text, a number, a truth value, null or an empty list or object: ``total``, ``items[0].name``.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vlm_lora.inference.metrics.answers import anls, exact_match

_FENCED = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL | re.IGNORECASE)


class Compared(NamedTuple):
    """One answer against one reference: 0 or 1 for each, or shares.

    Attributes:
        parses: whether it is JSON, perhaps in a Markdown fence.
        same: whether it has the reference's fields, all equal, and no others.
        fields: of the reference's fields, those that are equal (as `exact_match` compares).
        anls: the mean ANLS of the reference's fields; 0 of one that is missing.
        missing: of the reference's fields, those that the answer lacks.
        extra: of the answer's fields, those that the reference lacks.
    """

    parses: float
    same: float
    fields: float
    anls: float
    missing: float
    extra: float


def fields_of(text: str) -> dict[str, str] | None:
    """The fields of an object or a list and their values as texts; None of what is no JSON, or a bare value."""
    fenced = _FENCED.fullmatch(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
        return dict(_leaves("", value)) if isinstance(value, dict | list) else None
    except (ValueError, RecursionError):
        return None


def _leaves(path: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(f"{path}.{name}" if path else name, inner)
    elif isinstance(value, list) and value:
        for i, inner in enumerate(value):
            yield from _leaves(f"{path}[{i}]", inner)
    elif isinstance(value, float) and value.is_integer():
        yield path, str(int(value))  # 5.0 is 5
    else:
        yield path, value if isinstance(value, str) else json.dumps(value)


def compared(answer: str, references: Sequence[str]) -> Compared:
    """Against the reference that it comes nearest to; references are JSON."""
    given = fields_of(answer)
    if given is None:
        return Compared(0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    found = [_against(given, wanted) for wanted in map(fields_of, references) if wanted is not None]
    return max(found, key=lambda each: (each.same, each.fields, each.anls, -each.extra))


def _against(given: dict[str, str], wanted: dict[str, str]) -> Compared:
    each = [field_scores(given, wanted, path) for path in wanted]
    right, near = (sum(scores) / len(each) for scores in zip(*each, strict=True))
    missing = sum(path not in given for path in wanted) / len(wanted)
    extra = sum(path not in wanted for path in given) / len(given)
    return Compared(1.0, float(right == 1 and not extra), right, near, missing, extra)


def field_scores(given: dict[str, str] | None, wanted: dict[str, str], path: str) -> tuple[float, float]:
    """Exact match and ANLS of one of the wanted fields; 0 where it is missing."""
    if given is None or path not in given:
        return 0.0, 0.0
    if not wanted[path]:  # an empty text, which is like no other
        empty = float(not given[path].strip())
        return empty, empty
    return exact_match(given[path], [wanted[path]]), anls(given[path], [wanted[path]])
