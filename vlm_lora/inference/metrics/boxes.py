"""Scores of answers that say where something is, by boxes: how much of the right place each covers.

Intersection over union does not change where both axes are stretched, so boxes are compared in whatever coordinates
the model speaks in: pixels of a resized image, thousandths. What something is called is not compared, nor are points.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from vlm_lora.inference.metrics.answers import plain

HIT = 0.5
"""The least intersection over union of a box that is right, as in RefCOCO (Yu et al. 2016) and PASCAL VOC."""

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]|\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)")

Corners = tuple[float, float, float, float]


class Found(NamedTuple):
    """One answer against one reference.

    Attributes:
        right: of the reference's boxes, those that the answer hits, each by a box of its own; where the answer has
            more boxes than the reference, of these.
        overlap: the mean intersection over union of the same, 0 of a box that no other belongs to.
        read: whether there is a box in the answer.
    """

    right: float
    overlap: float
    read: float


def boxes_in(text: str) -> list[Corners]:
    """The boxes that a text names, in any family's words: ``[x1, y1, x2, y2]``, as in JSON, ``(x1,y1),(x2,y2)``."""
    found = []
    for match in _BOX.finditer(text):
        x1, y1, x2, y2 = (float(number) for number in match.groups() if number is not None)
        found.append((x1, y1, x2, y2))
    return found


def shares(box: Corners, frame: Corners) -> Corners:
    """The box in shares of the picture, which lies in the box's coordinates at ``frame``: left, top, width, height."""
    x1, x2 = ((x - frame[0]) / frame[2] for x in box[::2])
    y1, y2 = ((y - frame[1]) / frame[3] for y in box[1::2])
    return x1, y1, x2, y2


def moved(text: str, old: Corners, new: Corners) -> str:
    """A text with its boxes in other coordinates: those in which the picture lies at ``new``, and not at ``old``."""

    def place(match: re.Match) -> str:
        (box,) = boxes_in(match[0])
        made = [new[i % 2] + share * new[2 + i % 2] for i, share in enumerate(shares(box, old))]
        return str(made)

    return _BOX.sub(place, text)


def overlap(one: Corners, other: Corners) -> float:
    """Intersection over union; 0 with a box that is empty, or upside down."""
    wide, high = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1))
    areas = [max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (one, other)]
    shared = max(0.0, wide) * max(0.0, high)
    return shared / (sum(areas) - shared) if all(areas) else 0.0


def found(answer: str, references: Sequence[str]) -> Found:
    """Against the reference that it comes nearest to. An answer without any box that can be read misses all."""
    said = boxes_in(answer)
    return max(_against(answer, said, reference) for reference in references)


def _against(answer: str, said: list[Corners], reference: str) -> Found:
    wanted = boxes_in(reference)
    if plain(answer) == plain(reference):  # also where a box is so small that rounding has left nothing of it
        return Found(1.0, 1.0, 1.0)
    pairs = sorted(
        ((overlap(box, other), i, j) for i, box in enumerate(said) for j, other in enumerate(wanted)),
        key=lambda pair: -pair[0],
    )
    matched: dict[int, int] = {}
    shares = []
    for share, i, j in pairs:  # the best first, each box once, as detection benchmarks match
        if i not in matched and j not in matched.values():
            matched[i] = j
            shares.append(share)
    most = max(len(said), len(wanted))
    return Found(sum(share >= HIT for share in shares) / most, sum(shares) / most, float(bool(said)))
