"""Boxes and points of a row, from ms-swift's `objects` or from Qwen's JSON in its texts, as `Box`es of the dialogue.

`objects` is what ms-swift's documents ("Custom dataset", Grounding) have: `ref`, the names that stand at `<ref-object>`
in the texts, and `bbox`, the boxes (four numbers) and points (two) that stand at `<bbox>`, each in order through the
conversation. `bbox_type` says what the numbers are: pixels ("real", the default), or shares of the image ("norm1", or
"norm1000" of a thousand). `image_id` is the image of each box, 0 where left out; `width` and `height` (one for each
image) are the size that pixels are of, where it is not that of the file.
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from vlm_lora.data.example import BBOX, REF, Box, Dialogue, ImageRef, Turn
from vlm_lora.data.images import image_size
from vlm_lora.errors import DataError

FIELDS = ("ref", "bbox", "bbox_type", "image_id", "width", "height")
TYPES = {"real": 0, "norm1": 1, "norm1000": 1000}
"""What the numbers of a box are, and what they are shares of; 0: they are pixels."""
AS_IS = "as-is"
MOST_OUTSIDE = 0.01
"""A box may reach out of its image by this share of the side, or a pixel, and is cut off there: programs round."""

_PAIR = re.compile(r'("(?:bbox|point)_2d"\s*:\s*)(\[[^\[\]]*\])')
_KEY = re.compile(r'"(?:bbox|point)_2d"\s*:')
_TOKENS = re.compile(r"<\|(?:box|object_ref)_(?:start|end)\|>")


@dataclass(frozen=True, slots=True)
class BoxReader:
    """How the boxes of one data set are read.

    ``in_json`` is what the numbers of ``bbox_2d`` and ``point_2d`` in texts are: one of `TYPES`, or `AS_IS`.
    """

    in_json: str = AS_IS
    _sizes: dict[ImageRef, tuple[int, int]] = field(default_factory=dict)

    def with_objects(
        self, said: Sequence[Dialogue | DataError], objects: Any, images: Sequence[ImageRef]
    ) -> list[Dialogue | DataError]:
        """What a row says, with the boxes of its `objects`.

        Raises DataError where these are of another shape, do not go with the texts, or are not in their image.
        """
        if isinstance(objects, str):
            with suppress(ValueError, RecursionError):
                objects = json.loads(objects)
        filled = {k: v for k, v in objects.items() if v is not None} if isinstance(objects, dict) else None
        if filled is None or filled.keys() - set(FIELDS):
            found = f"{', '.join(map(repr, filled))}" if filled else type(objects).__name__
            raise DataError(
                f"has objects of a shape that is not known ({found[:100]}); expected those of ms-swift, "
                f"{', '.join(FIELDS)}: write them so, or read the rows without them: --ignore-columns objects"
            )
        refs, boxes, kind = filled.get("ref", []), filled.get("bbox", []), filled.get("bbox_type") or "real"
        if not isinstance(refs, list) or not all(isinstance(ref, str) and ref.strip() for ref in refs):
            raise DataError(f"its objects have a ref that is {str(refs)[:60]!r}; expected a list of names")
        if not isinstance(boxes, list):
            raise DataError(f"its objects have a bbox that is {str(boxes)[:60]!r}; expected a list of boxes")
        if not isinstance(kind, str) or kind not in TYPES:
            raise DataError(f"its objects have the bbox_type {kind!r}; expected one of {', '.join(TYPES)}")
        if not refs and not boxes:
            return list(said)
        if len(said) != 1:
            raise DataError("has objects, and several texts that they may belong to; write a row for each text")
        if isinstance(said[0], DataError):
            raise said[0]
        which = filled.get("image_id", [])
        which = which if isinstance(which, list) else [which] * len(boxes)
        which = [*which, *[0] * (len(boxes) - len(which))]
        if len(which) > len(boxes) or not all(type(i) is int and 0 <= i < len(images) for i in which):
            raise DataError(
                f"its objects have the image_id {repr(filled.get('image_id', 0))[:60]}, for {len(boxes)} box(es) in "
                f"{len(images)} image(s); expected for each box the number of its image, from 0"
            )
        stated = [filled.get(side) for side in ("width", "height")]
        made = [
            self._box(box, i, images, kind, _size_of(stated, i, len(images)))
            for box, i in zip(boxes, which, strict=True)
        ]
        return [_with_marks(said[0], tuple(ref.strip() for ref in refs), tuple(made))]

    def with_json(self, dialogue: Dialogue, images: Sequence[ImageRef]) -> Dialogue:
        """The dialogue with the boxes of its texts' JSON, where it is said what their numbers are; else as it is.

        Raises DataError for numbers that are none of a box, or not in the image.
        """
        texts = [text for turn in dialogue.turns for text in (turn.user, turn.assistant)]
        if self.in_json == AS_IS or not any(map(_KEY.search, (*texts, *dialogue.accepted))):
            return dialogue
        if dialogue.has_marks and not any(map(_PAIR.search, texts)):
            return dialogue  # the JSON has marks in the place of numbers
        if len(images) != 1 or dialogue.accepted or dialogue.has_marks or any(REF in t or BBOX in t for t in texts):
            raise DataError(
                "has boxes in the JSON of its texts, and it is not one image, one answer and no mark beside them; "
                "write the boxes as objects, or leave out --json-boxes"
            )
        boxes: list[Box] = []

        def lifted(text: str) -> str:
            def mark(match: re.Match) -> str:
                with suppress(ValueError):
                    boxes.append(self._box(json.loads(match[2]), 0, images, self.in_json, None))
                    return match[1] + BBOX
                return match[0]

            found = _PAIR.sub(mark, text)
            if len(_KEY.findall(text)) != found.count(BBOX):
                raise DataError(
                    f"has a bbox_2d or point_2d that is no list of numbers in {text[:60]!r}; expected "
                    '"bbox_2d": [x1, y1, x2, y2] or "point_2d": [x, y]'
                )
            return found

        def of(turn: Turn) -> Turn:
            asked = turn.asking([lifted(piece) for piece in turn.pieces])
            return replace(asked, assistant=lifted(turn.assistant))

        turns = tuple(of(turn) for turn in dialogue.turns)
        return _with_marks(replace(dialogue, turns=turns), (), tuple(boxes))

    def _box(
        self, box: object, image: int, images: Sequence[ImageRef], kind: str, stated: tuple[float, float] | None
    ) -> Box:
        """The box in pixels of its image; ``stated`` is the size of the image that its numbers are of."""
        numbers = [each for each in box if _is_number(each)] if isinstance(box, list) else []
        if not isinstance(box, list) or len(numbers) != len(box) or len(box) not in (2, 4):
            raise DataError(f"has the box {repr(box)[:60]}; expected x1, y1, x2, y2, or x, y of a point")
        ref = images[image]
        if ref not in self._sizes:
            self._sizes[ref] = image_size(ref.read_bytes(), ref.name)
        size = self._sizes[ref]
        of = (TYPES[kind], TYPES[kind]) if TYPES[kind] else stated or size
        if stated and abs(stated[0] * size[1] - stated[1] * size[0]) > max(stated) + max(size):
            raise DataError(
                f"its boxes are of an image of {stated[0]:g}x{stated[1]:g}, and {ref.name!r} has {size[0]}x{size[1]} "
                "pixels, another shape; correct width and height (of photos that are turned: as one sees them)"
            )
        points = [value * size[i % 2] / of[i % 2] for i, value in enumerate(numbers)]
        inside = [min(max(value, 0.0), float(size[i % 2])) for i, value in enumerate(points)]
        what = f"the box {box} ({kind}) of {ref.name!r}, which has {size[0]}x{size[1]} pixels,"
        for i, (value, within) in enumerate(zip(points, inside, strict=True)):
            if abs(value - within) > max(1.0, MOST_OUTSIDE * size[i % 2]):
                raise DataError(f"{what} reaches out of it; correct it, or say by bbox_type what its numbers are")
        if len(box) == 4 and not (inside[0] < inside[2] and inside[1] < inside[3]):
            raise DataError(f"{what} is empty; expected x1, y1, x2, y2 with x1 < x2 and y1 < y2, not width and height")
        return Box(tuple(inside), image, size, clipped=points != inside)


def has_numbers(text: str) -> bool:
    """Whether a text has boxes or points of Qwen's JSON in it, as numbers."""
    return _PAIR.search(text) is not None


def _with_marks(dialogue: Dialogue, refs: tuple[str, ...], boxes: tuple[Box, ...]) -> Dialogue:
    texts = [text for turn in dialogue.turns for text in (turn.user, turn.assistant)]
    for mark, given, name in ((REF, refs, "ref"), (BBOX, boxes, "bbox")):
        if (marks := sum(text.count(mark) for text in texts)) != len(given):
            raise DataError(f"has {marks} {mark} mark(s) but {len(given)} {name} in its objects; make them equal")
    if dialogue.accepted:
        raise DataError("has objects and several answers to one question; write a row for each answer")
    if any(REF in option or BBOX in option for option in dialogue.choices):
        raise DataError("has a box or a name of its objects among its options, which are compared as texts; name them")
    if found := next(filter(None, map(_TOKENS.search, (*texts, *refs))), None):
        raise DataError(f"has {found[0]!r} in a text beside objects; write it as {REF} or {BBOX}, or take it out")
    return replace(dialogue, refs=refs, boxes=boxes)


def _size_of(stated: list[Any], image: int, num_images: int) -> tuple[float, float] | None:
    """The width and height that a row states of an image; None where it states none. Raises DataError for others."""
    if stated == [None, None]:
        return None
    sides = [side if isinstance(side, list) else [side] for side in stated]
    if any(len(side) != num_images or not all(_is_number(n) and n > 0 for n in side) for side in sides):
        raise DataError(
            f"its objects have the width {repr(stated[0])[:60]} and the height {repr(stated[1])[:60]}; expected those "
            f"of each of its {num_images} image(s)"
        )
    return sides[0][image], sides[1][image]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e9 < value < 1e9  # NaN is not
