"""Multiple choice: the question with its lettered options below it, and the letter of the right one as the answer.

Rendered as LLaVA-1.5 was trained and lmms-eval asks (Liu et al. 2023, "Improved Baselines with Visual Instruction
Tuning"): ``question``, a line ``A. option`` for each, and `INSTRUCTION`.
"""

import json
import re
from collections.abc import Sequence
from string import ascii_uppercase

from vlm_lora.errors import DataError

INSTRUCTION = "Answer with the option's letter from the given choices directly."

_LABEL = re.compile(r"\s*\(?([A-Z])[.):]\s*(?=\S)")


def options_of(value: object, name: str) -> tuple[str, ...]:
    """The texts of the options, from a list, an object by letter, or either as a text of JSON.

    Raises DataError for anything else, fewer than two, more than there are letters, or two that are the same.
    """
    given = value
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            given = json.loads(value)
        except (ValueError, RecursionError):
            given = value
    if isinstance(given, dict) and list(given) == list(ascii_uppercase[: len(given)]):
        given = list(given.values())
    if not isinstance(given, list) or not 2 <= len(given) <= len(ascii_uppercase):
        raise DataError(f"its {name} is {str(value)[:60]!r}; expected a list of 2 to {len(ascii_uppercase)} options")
    texts = [str(each).strip() if isinstance(each, str | int | float) else "" for each in given]
    labels = [match and match[1] for match in map(_LABEL.match, texts)]
    if labels == list(ascii_uppercase[: len(texts)]):
        texts = [_LABEL.sub("", text, count=1) for text in texts]
    if not all(texts) or len(set(texts)) < len(texts):
        raise DataError(f"its {name} holds an option that is empty, no text, or there twice; correct it")
    return tuple(texts)


def letter_of(answer: object, options: Sequence[str]) -> str:
    """The letter of the right option, from that, its text, or its index from 0. A text that is an option is no index.

    Raises DataError for what is none of these, or may be two of them that are not the same.
    """
    letters = ascii_uppercase[: len(options)]
    if isinstance(answer, list) and len(answer) == 1:
        (answer,) = answer
    text = str(answer).strip() if isinstance(answer, str | int) and not isinstance(answer, bool) else ""
    found = {letters[i] for i, option in enumerate(options) if option == text}
    label = re.fullmatch(r"\(?([A-Za-z])[.):]?", text) or _LABEL.match(text)
    letter = label[1].upper() if label else ""
    if label and letter in letters and text[label.end() :] in ("", options[letters.index(letter)]):
        found.add(letter)
    if text.isascii() and text.isdigit() and int(text) < len(options) and not (found and isinstance(answer, str)):
        found.add(letters[int(text)])
    if len(found) == 1:
        return found.pop()
    what = "may be more than one of them" if found else "is none of them"
    raise DataError(
        f"the answer {text[:60]!r} {what}: expected the letter, the text or the index (from 0) of one of the "
        f"{len(options)} options {', '.join(map(repr, options))[:200]}; write the letter"
    )


def rendered(question: str, options: Sequence[str]) -> str:
    lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
    if all(line in question for line in lines):  # they stand in it already
        return question
    return "\n".join([question, *lines, INSTRUCTION])
