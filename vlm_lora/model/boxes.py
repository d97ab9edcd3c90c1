"""Boxes and points as each family of models was trained to say them, from pixels; pure, and without torch.

==========  ==============================================  =========================================================
Qwen2-VL    thousandths of the image, special tokens        ``<|object_ref_start|>a cat<|object_ref_end|>``
                                                            ``<|box_start|>(x1,y1),(x2,y2)<|box_end|>``
Qwen2.5-VL  pixels of the image as it is resized, JSON      ``[{"bbox_2d": [x1, y1, x2, y2], "label": "a cat"}]``
Qwen3-VL    thousandths of the image, JSON                  the same; ``{"point_2d": [x, y], "label": "a cat"}``
==========  ==============================================  =========================================================

Sources: ``convert_to_qwen2vl_format`` and ``convert_to_qwen25vl_format`` of QwenLM/Qwen3-VL,
``qwen-vl-finetune/tools/process_bbox.ipynb``, for the numbers and their rounding; issue 721 there for the frame of the
first two families, issues 1427 and 1486 for Qwen3-VL, which is to use the former again; 1427 has a box among words as
``[x1, y1, x2, y2]`` too. The tokens are those of ms-swift's ``Qwen2VLTemplate.replace_ref`` and ``replace_bbox``; JSON
for the others is what it calls ``QWENVL_BBOX_FORMAT=new`` (its pull request 6178). Of Qwen3.5 no source says anything:
it is taken for Qwen3-VL.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from vlm_lora.data.example import BBOX, REF, Box, Dialogue, Turn

REF_START, REF_END, BOX_START, BOX_END = TOKENS = (
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
)
TOKEN = re.compile(f"({'|'.join(map(re.escape, TOKENS))})")
"""One of the special tokens in a text that `rendered` made; no text of a person beside boxes has one."""

_MARK = re.compile(f"{REF}|{BBOX}")
_IN_JSON = re.compile(rf'"(?:bbox|point)_2d"\s*:\s*{BBOX}')
_LIST = re.compile(rf"(?:{REF}[\s,;:]*)?{BBOX}[\s,;.]*(?:(?:{REF}[\s,;:]*)?{BBOX}[\s,;.]*)*")
"""Nothing but boxes, perhaps each with its name before it, or one name for those that follow."""


class Frame(NamedTuple):
    """Where a picture lies in the coordinates that a model speaks in: its upper left corner, its size, and the most
    that x and y can be."""

    left: float
    top: float
    width: float
    height: float
    most: tuple[int, int]

    def place(self, box: Box) -> list[int]:
        """The box's points in these coordinates."""
        corner, size = self[:2], self[2:4]
        moved = [corner[i % 2] + value / box.size[i % 2] * size[i % 2] for i, value in enumerate(box.points)]
        return [max(0, min(round(value), self.most[i % 2])) for i, value in enumerate(moved)]


@dataclass(frozen=True, slots=True)
class Convention:
    """How a family says where something is."""

    in_pixels: bool
    """Of the image as the model sees it, resized; else in thousandths of it."""
    by_tokens: bool = False
    """With special tokens of their own; else in JSON."""


def rendered(dialogue: Dialogue, convention: Convention, frame: Callable[[int, int], Frame]) -> Dialogue:
    """The dialogue with its names and boxes in its texts, as the family says them; itself where it has none.

    A list of nothing but boxes, as an answer, is Qwen's list of JSON, a name before a box its label. Among words a box
    is its numbers in square brackets, and a name is the name, as ms-swift has it for the families with JSON. Where the
    text is JSON already, with ``"bbox_2d": <bbox>``, names and numbers stand in it in every family.

    Args:
        frame: of an image's width and height.
    """
    if not dialogue.has_marks:
        return dialogue
    refs, boxes = iter(dialogue.refs), iter(dialogue.boxes)

    def numbers(box: Box) -> str:
        return json.dumps(frame(*box.size).place(box))

    def name(ref: str, in_json: bool) -> str:
        if in_json:
            return json.dumps(ref, ensure_ascii=False)[1:-1]
        return f"{REF_START}{ref}{REF_END}" if convention.by_tokens else ref

    def said(box: Box, in_json: bool) -> str:
        if in_json or not convention.by_tokens:
            return numbers(box)
        x = [str(each) for each in frame(*box.size).place(box)]
        pairs = ",".join(f"({x[i]},{x[i + 1]})" for i in range(0, len(x), 2))
        return f"{BOX_START}{pairs}{BOX_END}"

    def listed(text: str) -> Iterator[str]:
        label = ""
        for mark in _MARK.findall(text):
            if mark == REF:
                label = f', "label": {json.dumps(next(refs), ensure_ascii=False)}'
            else:
                box = next(boxes)
                key = "bbox_2d" if len(box.points) == 4 else "point_2d"
                yield f'{{"{key}": {numbers(box)}{label}}}'

    def filled(text: str, in_json: bool) -> str:
        return _MARK.sub(lambda m: name(next(refs), in_json) if m[0] == REF else said(next(boxes), in_json), text)

    def answer(text: str) -> str:
        if not convention.by_tokens and _LIST.fullmatch(text.strip()):
            return f"[{', '.join(listed(text))}]"
        return filled(text, bool(_IN_JSON.search(text)))

    def of(turn: Turn) -> Turn:
        in_json = bool(_IN_JSON.search(turn.user))
        asked = turn.asking([filled(piece, in_json) for piece in turn.pieces])
        return replace(asked, assistant=answer(turn.assistant))

    return replace(dialogue, turns=tuple(map(of, dialogue.turns)), refs=(), boxes=())


def as_decoded(text: str) -> str:
    """A rendered text as an answer of the model comes out: without special tokens."""
    return TOKEN.sub("", text)


def in_pixels(dialogue: Dialogue) -> Dialogue:
    """The dialogue for a person to read, its boxes in pixels of the images as they are."""
    return rendered(dialogue, Convention(in_pixels=True), lambda w, h: Frame(0, 0, w, h, (w, h)))
