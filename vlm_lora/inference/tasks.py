"""What an answer is to be scored as: a caption, a choice between options, a short answer to a question, a long one.

It follows from where a text comes from and what it is, answer by answer, and never from a mean over the data: captions
stay captions however short they are, and questions beside captions are scored apart from them.
"""

from collections.abc import Sequence

from vlm_lora.data.example import Dialogue
from vlm_lora.inference.metrics.tokens import level_for
from vlm_lora.inference.wording import num_words

CAPTIONS, CHOICES, ANSWERS, TEXTS = "captions", "choices", "answers", "texts"

LONG_ANSWER = 8
"""Words; of a language that is written without spaces, twice as many characters. Nobody says more in the same words."""


def task_of(asked: Dialogue, references: Sequence[str], prompt: str) -> str:
    """The task that answers to the dialogue's last turn are scored as.

    Args:
        references: the answers that the data has.
        prompt: the instruction for captions. Whoever is asked with it is asked for a caption, whatever the format.
    """
    if asked.choices:
        return CHOICES
    if asked.turns[-1].user == prompt if asked.caption is None else asked.caption:
        return CAPTIONS
    return TEXTS if all(map(_is_long, references)) else ANSWERS


def _is_long(text: str) -> bool:
    words = num_words(text)
    return words > LONG_ANSWER and (level_for([text]) == "word" or words > 2 * LONG_ANSWER)
