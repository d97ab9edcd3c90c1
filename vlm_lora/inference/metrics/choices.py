"""Scores of answers to multiple choice."""

import re
from collections.abc import Sequence
from string import ascii_uppercase

from vlm_lora.inference.metrics.answers import plain
from vlm_lora.inference.wording import says


def chosen(answer: str, options: Sequence[str]) -> str | None:
    """The letter of the option that an answer names, by its letter or else by its text; None where it names none, or
    several.

    As VLMEvalKit does before it asks a language model (Duan et al. 2024, "VLMEvalKit"), but for a letter inside a
    sentence, which counts only after "answer", "option" or "choice": "A" is an article too.
    """
    letters = ascii_uppercase[: len(options)]
    text = answer.strip().strip("*`\"'").strip()
    alone = re.fullmatch(r"\(?([A-Za-z])[).:]*", text)
    told = re.match(r"\(?([A-Z])[).:]", text) or re.search(
        r"\b(?:[Aa]nswer|[Oo]ption|[Cc]hoice)(?: is)?\W{1,4}([A-Z])(?!\w)", text
    )
    for found in (alone, told):
        if found and found[1].upper() in letters:
            return found[1].upper()
    named = [letter for letter, option in zip(letters, options, strict=True) if plain(option) == plain(text)]
    named = named or [letter for letter, option in zip(letters, options, strict=True) if says(text, [option])]
    return named[0] if len(named) == 1 else None


def right_option(answer: str, letters: Sequence[str], options: Sequence[str]) -> float:
    """1.0 if the answer names the right option, by letter or by text, else 0.0."""
    return float(chosen(answer, options) in letters)
