"""What comes in: pictures, through the loader that training uses and through no other, and numbers."""

import logging
import re
import reprlib
from abc import ABCMeta
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.blocks import Block
from gradio.data_classes import FileData, ImageData
from gradio.exceptions import ComponentProcessingError
from pydantic import ValidationError

from vlm_lora import ImageRef, load_image
from vlm_lora.demo.uploads import MOST_FILES
from vlm_lora.errors import ConfigError, DataError

log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 512


def plain(text: str) -> gr.Error:
    """An error as a person at the page sees it: a sentence, and nothing in the log."""
    text = text.removesuffix(".") + "."
    return gr.Error(text[0].upper() + text[1:], print_exception=False)


def plainly(error: BaseException) -> gr.Error:
    """What a person at the page is told of any error: what they can do something about, and else where it is told."""
    error = error.__cause__ or error if isinstance(error, ComponentProcessingError) else error  # what `preprocess` says
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, DataError | ConfigError):
        return plain(str(error))
    log.error("The demo could not do what was asked", exc_info=error)
    return plain("This did not work. What went wrong is in the demo's log.")


# What `preprocess` gives is Any below: the types of gradio's own are those of its own components' values.


class _WithoutStub(type(gr.Image)):
    """Gradio writes a .pyi file beside the source of a new component; a package does not change itself."""

    def __new__(mcs, name, bases, attributes):
        return ABCMeta.__new__(mcs, name, bases, attributes)


class _FromTheirMachine(Block):
    is_template = True  # drawn in the browser as its first base is

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        """Refuses web addresses, which the API would have the server fetch."""
        if str(url_or_file_path).startswith(("http:", "https:")):
            raise plain("Web addresses are not fetched. Send the picture itself.")
        return await super().async_move_resource_to_block_cache(url_or_file_path)


def _reference(file: FileData) -> ImageRef:
    """By reference, so that both models share what the tower made of it; named as on their machine."""
    if not file.path:
        raise plain("The picture did not arrive. Choose it again.")
    if not Path(file.path).is_file():
        raise plain("The picture is no longer here: uploads are kept for an hour. Choose it again.")
    name = re.sub(r'[\\/:*?"<>|\x00-\x1f]', "_", Path(file.orig_name or "").name).lstrip(".")
    return ImageRef(path=Path(file.path), name=name or "the picture")


class _SentImage(ImageData):
    @classmethod
    def model_validate(cls, obj: Any, **how: Any) -> "_SentImage":
        try:
            return super().model_validate(obj, **how)
        except ValidationError:
            raise plain("The picture is no file. From Python send it as handle_file('cat.jpg')") from None


class SafeImage(gr.Image, _FromTheirMachine, metaclass=_WithoutStub):
    """An image input whose pictures go through our loader: a bad one gives a plain sentence."""

    data_model = _SentImage

    def preprocess(self, payload: Any) -> Any:
        picture = payload and _reference(payload)
        if picture:
            load_image(picture)
        return picture


class SafeFiles(gr.File, _FromTheirMachine, metaclass=_WithoutStub):
    """Several pictures at once; whether each can be read is found out when it is its turn."""

    def preprocess(self, payload: Any) -> Any:
        files = list(payload or [])
        if len(files) > MOST_FILES:
            raise plain(f"{len(files):,} files are too many at once; choose {MOST_FILES:,} or fewer")
        return [_reference(file) for file in files]


class _AsSent(Block):
    """Gives what was sent as it is, for `decoding` to check: gradio's own errors do not say which number they mean."""

    precision: int | None = None

    def api_info(self) -> dict[str, Any]:
        return {"type": "integer" if self.precision == 0 else "number"}

    def preprocess(self, payload: Any) -> Any:
        return payload


class Slider(_AsSent, gr.Slider, metaclass=_WithoutStub):
    pass


class Number(_AsSent, gr.Number, metaclass=_WithoutStub):
    pass


def decoding(*sent: Any) -> dict[str, Any]:
    """What was sent, as numbers by name; the bounds are `Decoding`'s, but for those of the demo."""
    numbers: dict[str, Any] = dict(zip(("max_new_tokens", "temperature", "top_p", "seed"), sent, strict=True))
    numbers["seed"] = 0 if numbers["seed"] is None else numbers["seed"]  # an emptied field
    for name, number in numbers.items():
        flag, integer = "--" + name.replace("_", "-"), name in ("max_new_tokens", "seed")
        if type(number) not in (int, float) or (integer and number % 1 != 0):
            told = "empty" if number is None else reprlib.repr(number)
            raise plain(f"{flag} is {told}; expected a {'whole ' * integer}number")
        if integer:
            numbers[name] = int(number)
    if numbers["max_new_tokens"] > MAX_NEW_TOKENS:
        raise plain(f"--max-new-tokens is {sent[0]:.0f}; the demo gives {MAX_NEW_TOKENS} or fewer")
    return numbers
