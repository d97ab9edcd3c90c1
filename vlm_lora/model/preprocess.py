"""The base model without its weights: pictures to patches, sizes to grids, texts to tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from vlm_lora.errors import ModelError
from vlm_lora.model.boxes import Frame
from vlm_lora.model.families import FAMILIES, Family
from vlm_lora.model.folder import cannot_be_loaded, check_model_folder, find_model

MAX_ASPECT = 200  # of transformers' smart_resize, which raises beyond it
FITTING = "fit 1"  # goes into the fingerprint of features: change it with what `Preprocessor.preprocess` does


class Pixels(NamedTuple):
    """Images in patches, as the tower takes them.

    ``pixel_values`` is ``(patches, 3 * 2 * patch * patch)``; ``grid_thw`` ``(num_images, 3)``, before the 2x2 merge.
    """

    pixel_values: torch.Tensor
    grid_thw: torch.Tensor


@dataclass(kw_only=True)
class Preprocessor:
    """A base model's processor without its weights: pictures to patches, sizes to grids, texts to tokens.

    ``name`` is what the user called the model.
    """

    processor: Any
    name: str
    family: Family

    @property
    def num_prompt_tokens(self) -> int:
        """How many trained vectors stand before everything, as tokens -1, -2 and so on."""
        return 0

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.processor.image_token)

    @property
    def merge_size(self) -> int:
        return self.processor.image_processor.merge_size

    @property
    def pixel_limits(self) -> tuple[int, int]:
        """Smallest and largest image area, in pixels, that the processor resizes to."""
        size = self.processor.image_processor.size
        return size["shortest_edge"], size["longest_edge"]

    def preprocess(self, images: Sequence[Image.Image]) -> Pixels:
        """The images in patches.

        The one place where a picture is given the model's size, in training, evaluation, captioning and the
        demo. It takes any size from 1x1.
        """
        batch = self.processor.image_processor(images=[self.fitted(image) for image in images], return_tensors="pt")
        return Pixels(batch["pixel_values"], batch["image_grid_thw"])

    def fitted(self, image: Image.Image) -> Image.Image:
        """The image itself; but one so long and thin that the processor would refuse it (one side more than 200 times
        the other) or overshoot ``max_pixels`` stands centred on white, just wide enough that it does not."""
        wide, high, padded = self._fit(*image.size)
        return _on_white(image, padded, (wide, high)) if padded else image

    def resized(self, image: Image.Image) -> Image.Image:
        """The image in the size that the model sees it in, resized as `preprocess` does; itself where it has that size.

        Another program that resizes in its own way finds nothing to resize in it.
        """
        fitted = self.fitted(image)
        _, high, wide = self.grid(*fitted.size)
        patch, merge = self.processor.image_processor.patch_size, self.merge_size
        size = wide * patch, high * patch
        if fitted.size == size or self.grid(*size) != (1, high, wide):  # limits so close that no size stays as it is
            return fitted
        # The processor gives patches alone, so they are laid out again; all frames of a picture are the same.
        plain = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
        patches = self.processor.image_processor(images=[fitted], **plain)["pixel_values"]
        cells = patches.reshape(high // merge, wide // merge, merge, merge, 3, -1, patch, patch)[:, :, :, :, :, 0]
        pixels = cells.permute(0, 2, 5, 1, 3, 6, 4).reshape(size[1], size[0], 3)
        return Image.fromarray(pixels.to(torch.uint8).numpy())

    def grid(self, width: int, height: int) -> tuple[int, int, int]:
        """The ``grid_thw`` that `preprocess` gives for a picture of this size; no picture is needed."""
        wide, high, _ = self._fit(width, height)
        patch = self.processor.image_processor.patch_size
        return 1, high // patch, wide // patch

    def frame(self, width: int, height: int) -> Frame:
        """Where a picture of this size lies in the coordinates that the family speaks of boxes in; what the model sees
        of it may be wider than the picture, by a white border."""
        wide, high, padded = self._fit(width, height)
        corner, size = _placed((width, height), padded, (wide, high)) if padded else ((0, 0), (wide, high))
        if self.family.boxes.in_pixels:
            return Frame(*corner, *size, (wide - 1, high - 1))
        x, y = 1000 / wide, 1000 / high
        return Frame(corner[0] * x, corner[1] * y, size[0] * x, size[1] * y, (1000, 1000))

    def _fit(self, width: int, height: int) -> tuple[int, int, tuple[int, int] | None]:
        """Width and height that a picture is resized to, and the size it is first padded to, or None.

        The processor works to whole merged patches, so the area may be above ``max_pixels`` by one row of
        them (of a square picture); where it would be more, the shorter side is padded until it is not.
        """
        smart_resize = _smart_resize()
        factor = self.processor.image_processor.patch_size * self.merge_size
        least, most = self.pixel_limits

        def resized(size: tuple[int, int]) -> tuple[int, int]:
            high, wide = smart_resize(size[1], size[0], factor=factor, min_pixels=least, max_pixels=most)
            return wide, high

        long, short = max(width, height), min(width, height)
        if long <= MAX_ASPECT * short:
            wide, high = resized((width, height))
            if wide * high <= most + factor * (math.isqrt(most) + 1):
                return wide, high, None
        side = max(short, -(-long // MAX_ASPECT))
        while True:
            padded = (long, side) if width >= height else (side, long)
            target = resized(padded)
            # What is pasted must be a size that the processor leaves as it is. So not too long either, and
            # resized twice: with limits close together the first result may be below the lower one.
            if max(target) <= MAX_ASPECT * min(target):
                wide, high = resized(target)
                if least <= wide * high <= most or side >= long:
                    return wide, high, padded
            side = min(long, side + max(1, side // 16))


def load_preprocessor(name: str, *, min_pixels: int | None = None, max_pixels: int | None = None) -> Preprocessor:
    """A base model's processor alone, in a second where the model takes minutes: enough to count tokens."""
    folder = find_model(name, weights=False)
    return read_preprocessor(folder, check_model_folder(folder, name, weights=False), name, min_pixels, max_pixels)


def read_preprocessor(
    folder: Path, config: dict, name: str, min_pixels: int | None, max_pixels: int | None
) -> Preprocessor:
    """The processor in a folder that is checked already; None leaves its own limit.

    Raises:
        ModelError: the processor cannot be loaded, is another model's, or the limits leave no size between them.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise cannot_be_loaded(name, folder, error) from error
    images = processor.image_processor
    least, most = min_pixels or images.size["shortest_edge"], max_pixels or images.size["longest_edge"]
    cell = images.patch_size * images.merge_size
    if least > most or most < cell**2:
        raise ModelError(
            f"--model {name}: images cannot be at least {least} and at most {most} pixels; one token is "
            f"{cell**2}. Give both --min-pixels and --max-pixels."
        )
    # Sizes are whole tokens. Where no square of them lies between the limits, the upper one holds.
    # One less than the square: the processor rounds up, and would make 224.00000001 pixels a token more.
    least = min(least, (math.isqrt(most) // cell * cell) ** 2 - 1)
    images.size = dict(images.size) | {"shortest_edge": least, "longest_edge": most}
    image_token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    if image_token != config.get("image_token_id"):
        raise ModelError(
            f"--model {name}: the tokenizer's {processor.image_token} is token {image_token}, but config.json says "
            f"image_token_id {config.get('image_token_id')}. Model and tokenizer are not of one checkpoint."
        )
    return Preprocessor(processor=processor, name=name, family=FAMILIES[config["model_type"]])


@cache
def _smart_resize():
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    return smart_resize


def _on_white(image: Image.Image, padded: tuple[int, int], target: tuple[int, int]) -> Image.Image:
    """The image as if padded with white and then resized; the padded one, perhaps terabytes, is not made."""
    corner, size = _placed(image.size, padded, target)
    canvas = Image.new("RGB", target, "white")
    canvas.paste(image.resize(size, Image.Resampling.BICUBIC), corner)
    return canvas


def _placed(
    image: tuple[int, int], padded: tuple[int, int], target: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where an image of this size stands on its white: the upper left corner, and the size it has there."""
    wide, high = (max(1, round(side * t / p)) for side, p, t in zip(image, padded, target, strict=True))
    return ((target[0] - wide) // 2, (target[1] - high) // 2), (wide, high)
