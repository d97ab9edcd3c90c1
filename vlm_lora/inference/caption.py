"""What goes into captioning and what comes out of it. Needs no torch, as a server may do the work."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vlm_lora.config import DEFAULT_MAX_NEW_TOKENS
from vlm_lora.data.example import ImageRef
from vlm_lora.data.images import load_image
from vlm_lora.errors import ConfigError

ImageSource = ImageRef | Image.Image | bytes | str | Path

LEAST_TEMPERATURE = 1e-6
"""Logits divided by less would overflow."""


@dataclass(frozen=True, slots=True)
class Caption:
    """The caption of one image, or why it has none: exactly one of ``text`` and ``error`` is given."""

    image: str
    text: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """How answers are decoded.

    ``temperature`` 0 is greedy: the likeliest token each time; with ``num_beams`` above 1, beam search. Above 0 tokens
    are drawn from the likeliest that make up ``top_p``; what is drawn depends on ``seed``, image and question, not on
    what stands beside them in a batch.
    """

    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    num_beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

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
