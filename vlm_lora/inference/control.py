"""What holds an answer to what was asked of it while it is decoded: transformers' logits processors, and ours.

Transformers' look at tokens. Ours look at the text, as the same word comes in many tokens: with a space before it or
without, in any case, in pieces. (transformers' `NoBadWordsLogitsProcessor` forbids the sequences that it is given.)
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch

from vlm_lora.inference.caption import Decoding
from vlm_lora.inference.wording import folded, joins, num_words, says, without_loop

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From what was said ``(B, t)`` and scores ``(B, vocabulary)`` to other scores."""

NEVER = float("-inf")


def processors(tokenizer: Any, ends: Sequence[int], decoding: Decoding) -> list[Processor]:
    """In the order in which transformers' `generate` has them; none where nothing is asked for.

    Args:
        ends: the tokens that end an answer.
    """
    from transformers.generation import logits_process as generation

    made: list[Any] = []  # transformers' types are narrower than its code
    if decoding.repetition_penalty != 1:
        made.append(generation.RepetitionPenaltyLogitsProcessor(float(decoding.repetition_penalty)))
    if decoding.no_repeat_ngram:
        made.append(generation.NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram))
    if decoding.avoid or decoding.words or decoding.cut_loops or decoding.begin_with != decoding.begin_with.rstrip():
        made.append(TextControl(tokenizer, ends, decoding))
    if decoding.temperature > 0:
        made.append(generation.TemperatureLogitsWarper(float(decoding.temperature)))
        if decoding.top_k:
            made.append(generation.TopKLogitsWarper(decoding.top_k))
        if decoding.top_p < 1:
            made.append(generation.TopPLogitsWarper(decoding.top_p))
        if decoding.min_p:
            made.append(generation.MinPLogitsWarper(decoding.min_p))
    return made


def apply(made: Sequence[Processor], said: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    for processor in made:
        scores = processor(said, scores)
    return scores


class TextControl:
    """Keeps a text from holding ``avoid``; from ending before, or going on after, the number of its ``words``; and ends
    it where it says the same again and again. It looks at each row by itself."""

    def __init__(self, tokenizer: Any, ends: Sequence[int], decoding: Decoding):
        self.tokenizer, self.ends, self.decoding = tokenizer, list(ends), decoding
        self.avoid = [folded(word.strip()) for word in decoding.avoid]
        begin = decoding.begin_with
        self.before_space = begin.strip() if begin != begin.rstrip() else ""

    @cached_property
    def pieces(self) -> "_Pieces":
        return _pieces_of(self.tokenizer)

    def __call__(self, said: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        least, most = self.decoding.words or (0, None)
        for row, tokens in enumerate(said.tolist()):
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            count = num_words(text) if self.decoding.words else 0
            if (most is not None and count > most) or (self.decoding.cut_loops and without_loop(text) != text):
                ended = torch.full_like(scores[row], NEVER)
                ended[self.ends] = 0.0
                scores[row] = ended
                continue
            if count < least:
                scores[row, self.ends] = NEVER
            if self.before_space and text == self.before_space:
                scores[row, self.pieces.without_space] = NEVER
            for forbidden in self._forbidden(tokens, text):
                scores[row, forbidden] = NEVER
        return scores

    def _forbidden(self, tokens: list[int], text: str) -> Iterator[list[int]]:
        """Tokens after which the text would hold one of the words, also where it might yet become a longer one: it
        would be forced to, and make up a word."""
        if self.avoid and text.endswith("\ufffd"):  # within a character of several tokens
            parts = self.pieces.parts
            yield [t for t in parts if says(self.tokenizer.decode([*tokens, t]), self.decoding.avoid)]
        text = folded(text)
        for word in self.avoid:
            yield self.pieces.holding(word)
            for have in range(min(len(text), len(word) - 1) + 1):
                before = text[: len(text) - have]
                apart = not (before and joins(before[-1]) and joins(word[0]))
                if apart and text.endswith(word[:have]):
                    yield self.pieces.starting(word[have:])


class _Pieces:
    """The text of each token of a byte-level vocabulary, and where in it words are."""

    def __init__(self, tokenizer: Any):
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
        special = set(tokenizer.all_special_ids)
        self.texts: dict[int, str] = {}
        self.parts: list[int] = []  # tokens that hold parts of characters
        for token, piece in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
            if piece is None or token in special:
                continue
            data = bytes(byte_of[char] for char in piece) if all(char in byte_of for char in piece) else piece.encode()
            try:
                self.texts[token] = folded(data.decode())
            except UnicodeDecodeError:
                self.parts.append(token)
        self._sorted = sorted((text, token) for token, text in self.texts.items())
        self.starting, self.holding = lru_cache(4096)(self._starting), lru_cache(4096)(self._holding)

    @cached_property
    def without_space(self) -> list[int]:
        """Tokens that begin with no space."""
        return [*self.parts, *(token for token, text in self.texts.items() if not text.startswith(" "))]

    def _starting(self, rest: str) -> list[int]:
        """Tokens that begin with the rest of a word and have no letter right after it."""
        found = []
        for i in range(bisect_left(self._sorted, (rest, -1)), len(self._sorted)):
            text, token = self._sorted[i]
            if not text.startswith(rest):
                break
            if len(text) == len(rest) or not (joins(rest[-1]) and joins(text[len(rest)])):
                found.append(token)
        return found

    def _holding(self, word: str) -> list[int]:
        """Tokens that hold all of the word, after something else."""
        return [token for token, text in self.texts.items() if word in text[1:] and says(text, [word])]


_pieces_of = lru_cache(maxsize=4)(_Pieces)
