"""What an answer is to be scored as: a caption, a choice, boxes, JSON, a short answer to a question, a long one.

It follows from where a text comes from and what it is, answer by answer, and never from a mean over the data: captions
stay captions however short they are, and questions beside captions are scored apart from them.
"""

from collections.abc import Sequence

from vlm_lora.data.example import Dialogue
from vlm_lora.inference.metrics.boxes import boxes_in
from vlm_lora.inference.metrics.structured import fields_of
from vlm_lora.inference.metrics.tokens import level_for
from vlm_lora.inference.wording import num_words

CAPTIONS, CHOICES, ANSWERS, JSON, TEXTS = "captions", "choices", "answers", "json", "texts"
BOXES = "boxes"

LONG_ANSWER = 8
"""Words; of a language that is written without spaces, twice as many characters. Nobody says more in the same words."""


def task_of(asked: Dialogue, references: Sequence[str], prompt: str, *, boxes: bool = False) -> str:
    """The task that answers to the dialogue's last turn are scored as.

    Args:
        boxes: whether the data answers with boxes (`Dialogue.answers_with_boxes`).
        references: the answers that the data has.
        prompt: the instruction for captions. Whoever is asked with it is asked for a caption, whatever the format.
    """
    if asked.choices:
        return CHOICES
    if boxes and all(map(boxes_in, references)):
        return BOXES
    if all(text.lstrip()[:1] in ("{", "[") and fields_of(text) for text in references):
        return JSON
    if asked.turns[-1].user == prompt if asked.caption is None else asked.caption:
        return CAPTIONS
    return TEXTS if all(map(_is_long, references)) else ANSWERS


def _is_long(text: str) -> bool:
    words = num_words(text)
    return words > LONG_ANSWER and (level_for([text]) == "word" or words > 2 * LONG_ANSWER)
