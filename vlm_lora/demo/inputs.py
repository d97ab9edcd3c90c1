"""What comes in: pictures, through the loader that training uses and through no other, questions and numbers. And what
is said of what goes wrong."""

import logging
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import FileData
from gradio.exceptions import ComponentProcessingError
from pydantic import ValidationError

from vlm_lora import Decoding, ImageRef, load_image
from vlm_lora.config import DEFAULT_MAX_NEW_TOKENS, DEFAULT_PROMPT, flag_of
from vlm_lora.demo.folders import short
from vlm_lora.errors import ConfigError, DataError

log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 512
MAX_PROMPT = 2000
"""Characters."""


def plainly(error: BaseException, *folders: Path) -> gr.Error:
    """What a person at the page is told of any error: a sentence, without the paths of these ``folders`` and without
    HTML, as which gradio shows it. What they can do nothing about is told in the log."""
    error = error.__cause__ or error if isinstance(error, ComponentProcessingError) else error  # what `preprocess` says
    text = error.message if isinstance(error, gr.Error) else str(error)
    if isinstance(error, ValidationError):
        text = "The picture is no file. From Python send it as handle_file('cat.jpg')"
    elif not isinstance(error, DataError | ConfigError | gr.Error):
        log.error("The demo could not do what was asked", exc_info=error)
        text = "This did not work. What went wrong is in the demo's log"
    text = short(text, *folders).removesuffix(".").replace("<", "&lt;") + "."
    return gr.Error(text[0].upper() + text[1:], print_exception=False)


def from_their_machine(part: Any, preprocess: Callable) -> Any:
    """The part, reading in this way what was sent; web addresses, which the API would have the server fetch, are
    refused. Events give it values alone: for settings gradio would make another part of it, without all this."""
    move = part.async_move_resource_to_block_cache

    async def move_file(given: str | Path | None) -> str | None:
        if str(given).startswith(("http:", "https:")):
            raise ConfigError("Web addresses are not fetched. Send the picture itself.")
        return await move(given)

    part.preprocess, part.async_move_resource_to_block_cache = preprocess, move_file
    return part


def one_picture(sent: FileData | None) -> ImageRef | None:
    """Through our loader: a bad one gives a plain sentence."""
    picture = sent and _reference(sent)
    if picture:
        load_image(picture)
    return picture


def many_pictures(sent: Any) -> list[ImageRef]:
    """Several at once; whether each can be read is found out when it is its turn."""
    return [_reference(file) for file in sent or ()]


def _reference(file: FileData) -> ImageRef:
    """By reference, so that both models share what the tower made of it; named as on their machine."""
    if not Path(file.path).is_file():
        raise ConfigError("The picture is no longer here: uploads are kept for an hour. Choose it again.")
    name = re.sub(r'[\\/:*?"<>|\x00-\x1f]', "_", Path(file.orig_name or "").name).lstrip(".")
    return ImageRef(path=Path(file.path), name=name or "the picture")


def decoding(*sent: Any) -> Decoding:
    """What was sent, as numbers; the bounds are `Decoding`'s, but for those of the demo."""
    numbers: dict[str, Any] = dict(zip(("max_new_tokens", "temperature", "top_p", "seed"), sent, strict=True))
    numbers["seed"] = 0 if numbers["seed"] is None else numbers["seed"]  # an emptied field
    for name, number in numbers.items():
        integer = name in ("max_new_tokens", "seed")
        if type(number) not in (int, float) or (integer and number % 1 != 0):
            told = "empty" if number is None else reprlib.repr(number)
            raise ConfigError(f"{flag_of(name)} is {told}; expected a {'whole ' * integer}number")
        if integer:
            numbers[name] = int(number)
    if numbers["max_new_tokens"] > MAX_NEW_TOKENS:
        raise ConfigError(f"--max-new-tokens is {sent[0]:.0f}; the demo gives {MAX_NEW_TOKENS} or fewer")
    return Decoding(**numbers)


def prompt_box() -> gr.Textbox:
    hint = f"Leave empty for: {DEFAULT_PROMPT}"
    return gr.Textbox("", label="Question or instruction", placeholder=hint, max_length=MAX_PROMPT, max_lines=6)


def asked_text(prompt: str | None) -> str | None:
    if len(prompt or "") > MAX_PROMPT:
        raise ConfigError(f"The question is longer than {MAX_PROMPT:,} characters.")
    return (prompt or "").strip() or None


def advanced() -> list[Any]:
    """What `decoding` takes, folded away below a question."""
    with gr.Accordion("Advanced: length and sampling", open=False):
        numbers: list[Any] = [
            gr.Slider(1, MAX_NEW_TOKENS, DEFAULT_MAX_NEW_TOKENS, step=1, precision=0, label="Most tokens"),
            gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: always the likeliest word)"),
            gr.Slider(0.05, 1, 1, step=0.05, label="Top p (only with a temperature)"),
            gr.Number(0, label="Seed", precision=0),
        ]
    for number in numbers:  # gradio's own errors do not say which number they mean, and its bounds are the page's
        number.preprocess = lambda payload: payload
    return numbers
