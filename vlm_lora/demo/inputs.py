"""What comes in: pictures, through the loader that training uses, and through no other."""

import re
from abc import ABCMeta
from pathlib import Path

import gradio as gr

from vlm_lora import ImageRef, load_image
from vlm_lora.errors import DataError

MAX_FILES = 50
"""Pictures captioned in one go."""


def plain(text: str) -> gr.Error:
    """An error as a person at the page sees it: a sentence, and nothing in the log."""
    text = text.removesuffix(".") + "."
    return gr.Error(text[0].upper() + text[1:], print_exception=False)


class _WithoutStub(type(gr.Image)):
    """Gradio writes a .pyi file beside the source of a new component; a package does not change itself."""

    def __new__(mcs, name, bases, attributes):
        return ABCMeta.__new__(mcs, name, bases, attributes)


async def _from_their_machine(component, url_or_file_path):
    """Refuses web addresses, which the API would have the server fetch."""
    if str(url_or_file_path).startswith(("http:", "https:")):
        raise plain("Web addresses are not fetched. Send the picture itself.")
    return await gr.blocks.Block.async_move_resource_to_block_cache(component, url_or_file_path)


def _reference(file) -> ImageRef:
    """By reference, so that both models share what the tower made of it; named as on their machine."""
    if not file.path:
        raise plain("The picture did not arrive. Choose it again.")
    if not Path(file.path).is_file():
        raise plain("The picture is no longer here: uploads are kept for an hour. Choose it again.")
    name = re.sub(r'[\\/:*?"<>|\x00-\x1f]', "_", Path(file.orig_name or "").name).lstrip(".")
    return ImageRef(path=Path(file.path), name=name or "the picture")


class SafeImage(gr.Image, metaclass=_WithoutStub):
    """An image input whose pictures go through our loader: a bad one gives a plain sentence."""

    is_template = True  # drawn in the browser as gr.Image is
    async_move_resource_to_block_cache = _from_their_machine

    def preprocess(self, payload) -> ImageRef | None:
        if payload is None:
            return None
        picture = _reference(payload)
        try:
            load_image(picture)
        except DataError as error:
            raise plain(str(error)) from None
        return picture


class SafeFiles(gr.File, metaclass=_WithoutStub):
    """Several pictures at once; whether each can be read is found out when it is its turn."""

    is_template = True
    async_move_resource_to_block_cache = _from_their_machine

    def preprocess(self, payload) -> list[ImageRef]:
        given = list(payload or [])
        if len(given) > MAX_FILES:
            raise plain(f"{len(given)} pictures are too many at once; choose {MAX_FILES} or fewer")
        return [_reference(file) for file in given]
