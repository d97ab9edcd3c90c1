"""What goes into captioning and what comes out of it. Needs no torch, as a server may do the work."""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from vlm_lora.config import DEFAULT_MAX_NEW_TOKENS, flag_of
from vlm_lora.data.example import ImageRef
from vlm_lora.data.images import load_image
from vlm_lora.errors import ConfigError
from vlm_lora.inference.wording import first_words, num_words, says, whole_sentences, without_loop

ImageSource = ImageRef | Image.Image | bytes | str | Path

LEAST_TEMPERATURE = 1e-6
"""Logits divided by less would overflow."""
AGAIN_TEMPERATURE = 0.7
"""At which an answer that misses what is required is drawn anew, where it was not drawn before."""


@dataclass(frozen=True, slots=True)
class Caption:
    """The caption of one image, or why it has none. Exactly one of `text` and `error` is not None."""

    image: str
    """The name of the image as it was given; "image" for one that came without a name."""
    text: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """How answers are decoded. By default greedily: the likeliest token each time.

    What is drawn depends on `seed`, image and question alone, and not on the rest of a batch.

    Raises:
        ConfigError: a value is out of bounds, or two do not go together.
    """

    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    """The most tokens of an answer."""
    num_beams: int = 1
    """Beams of a beam search; 1 is none."""
    temperature: float = 0.0
    """0 is greedy. Above 0, tokens are drawn from the model's probabilities with logits divided by it."""
    top_p: float = 1.0
    """Draw from the likeliest tokens whose probabilities add up to this (nucleus sampling, arXiv:1904.09751)."""
    seed: int = 0
    """Of the drawing."""
    top_k: int = 0
    """Draw from that many likeliest tokens; 0: from all."""
    min_p: float = 0.0
    """Draw from the tokens at least this many times as likely as the likeliest (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that the answer has said become less likely (arXiv:1909.05858). The question does not count."""
    no_repeat_ngram: int = 0
    """An answer never says the same this many tokens in a row twice; 0: it may."""
    begin_with: str = ""
    """The start of each answer, which the model continues. It is part of the answer."""
    avoid: tuple[str, ...] = ()
    """Words and phrases that no answer says, as whole words."""
    require: tuple[str, ...] = ()
    """Words and phrases that each caption says. One that does not is sampled again."""
    attempts: int = 5
    """How often to sample again, at most."""
    words: tuple[int, int] | None = None
    """The least and the most words."""
    whole_sentences: bool = False
    """If a limit cuts an answer off within a sentence, end it after the last whole one."""
    cut_loops: bool = False
    """End an answer where it starts to repeat itself."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens is {self.max_new_tokens}; expected 1 or more.")
        if self.num_beams < 1:
            raise ConfigError(f"--num-beams is {self.num_beams}; expected 1 or more.")
        if self.num_beams > 1 and self.temperature > 0:
            raise ConfigError("--num-beams searches and --temperature draws; give one of the two.")
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise ConfigError(
                f"--temperature is {self.temperature}; expected 0 (greedy) or a number from {LEAST_TEMPERATURE} on."
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p is {self.top_p}; expected above 0 and up to 1.")
        wrong = [
            (self.top_k < 0, "top_k", "0 (all) or a number of tokens"),
            (not 0 <= self.min_p <= 1, "min_p", "a share from 0 to 1"),
            (not 0 < self.repetition_penalty < math.inf, "repetition_penalty", "a number above 0; 1 changes nothing"),
            (self.no_repeat_ngram < 0, "no_repeat_ngram", "0 (they may come again) or a number of tokens"),
            (self.attempts < 0, "attempts", "0 or more"),
            (not all(map(str.strip, self.avoid)), "avoid", "words"),
            (not all(map(str.strip, self.require)), "require", "words"),
        ]
        for is_wrong, name, expected in wrong:
            if is_wrong:
                raise ConfigError(f"{flag_of(name)} is {getattr(self, name)!r}; expected {expected}.")
        if self.temperature == 0 and (self.top_k or self.min_p):
            raise ConfigError(
                f"{'--top-k' if self.top_k else '--min-p'} is about what is drawn; give a --temperature above 0 too."
            )
        if self.words and not 0 <= self.words[0] <= self.words[1] > 0:
            raise ConfigError(f"--words is {self.words[0]}..{self.words[1]}; expected a range such as 10..30.")
        for name in ("require", "begin_with"):
            if wrong_words := says(" ".join(getattr(self, name)) if name == "require" else self.begin_with, self.avoid):
                raise ConfigError(f"{flag_of(name)} asks for {wrong_words[0]!r}, which is to be avoided.")

    def require_served(self) -> None:
        """Raises ConfigError for what only a model that is loaded here can do: servers are sent what all of them know,
        as they pass over what they do not know without a word."""
        local = ("num_beams", "top_k", "min_p", "repetition_penalty", "no_repeat_ngram", "begin_with", "avoid", "words")
        if given := [flag_of(name) for name in local if getattr(self, name) != getattr(Decoding(), name)]:
            raise ConfigError(
                f"--endpoint cannot do {', '.join(given)}, for which the model has to be loaded here: leave that out, "
                "or give --adapter instead."
            )

    def finished(self, text: str, *, cut: bool) -> str:
        """The answer without its loop, words beyond the most, and a last sentence that is not whole; ``cut``: the
        tokens came to their limit."""
        if self.cut_loops and (shorter := without_loop(text)) != text:
            text, cut = shorter, True
        if self.words and num_words(text) > self.words[1]:
            text, cut = first_words(text, self.words[1]), True
        if self.whole_sentences and cut:
            text = whole_sentences(text)
        return text

    def missed(self, text: str) -> str:
        """What the answer was to do and does not, as the end of a sentence; "" where all is well."""
        said = says(text, self.require)
        if missing := [word for word in self.require if word not in said]:
            return f"does not say {', '.join(map(repr, missing))}"
        if found := says(text, self.avoid):
            return f"says {', '.join(map(repr, found))}"
        if self.words and (count := num_words(text)) < self.words[0]:
            limit = f"--max-new-tokens is {self.max_new_tokens}"
            return f"has {count} words; --words asks for {self.words[0]} to {self.words[1]}, {limit}"
        return ""

    def missed_by(self, text: str, missed: str) -> str:
        """The error of an image whose last caption tried is ``text``."""
        tried = f", the last of {1 + self.attempts} tried" if self.attempts else ""
        return f"the caption {text!r}{tried}, {missed}"

    def again(self, attempt: int) -> "Decoding":
        """That of a further attempt: drawn, each time from another seed."""
        temperature = self.temperature or AGAIN_TEMPERATURE
        return replace(self, temperature=temperature, num_beams=1, seed=self.seed + attempt)


def name_of(image: ImageSource) -> str:
    if isinstance(image, ImageRef):
        return image.name
    return str(image) if isinstance(image, str | Path) else "image"


def source_of(image: ImageSource) -> ImageRef | Image.Image:
    """Raises DataError for bytes that are no image; files are not opened yet."""
    if isinstance(image, ImageRef):
        return image
    if isinstance(image, str | Path):
        # A file of this very name comes first: Office leaves ones such as ~$photo.png.
        path = image if os.path.lexists(image) else os.path.expanduser(image)
        return ImageRef(path=Path(path).absolute(), name=str(image))
    return load_image(image)
