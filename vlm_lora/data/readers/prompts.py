"""Prompts with variables: ``Describe this picture. Its tags: {tags}``.

``{name}`` is the image's file name, ``{stem}`` that without its suffix, ``{folder}`` the name of the folder it lies in,
``{tags}`` the text of the file beside it (``cat.tags``, else ``cat.txt``), and any other name a column of the data, or
of a ``metadata`` file in the image's folder or above it. A column goes before a file. ``{{name}}`` stands for the text
``{name}``.
"""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from vlm_lora.data.example import ImageRef, read_regular_file
from vlm_lora.data.origin import depend_on
from vlm_lora.data.readers.tables import MAX_TEXT_BYTES, decode_text
from vlm_lora.errors import DataError

TAGS = (".tags", ".txt")
"""Suffixes of the file that holds an image's tags; the first that is there is read."""

_VARIABLE = re.compile(r"\{\{(\w[\w-]*)\}\}|\{(\w[\w-]*)\}")


def variables_of(prompt: str) -> list[str]:
    """The names of its variables, each once, in order."""
    return list(dict.fromkeys(match[2] for match in _VARIABLE.finditer(prompt) if match[2]))


def literal(prompt: str) -> str:
    """A prompt that has no variables, whatever it says: how earlier versions took every prompt."""
    return _VARIABLE.sub(lambda match: "{" + match[0] + "}" if match[2] else match[0], prompt)


def filled(prompt: str, image: ImageRef | None, columns: Mapping, caption_file: str = "") -> str:
    """The prompt for one image.

    Args:
        image: None where it comes from no file, and so has no name.
        columns: of its row in the data, but for the one that is to be learnt.
        caption_file: suffix of the file that holds what is to be learnt, and so is no file of tags.

    Raises:
        DataError: the image has no such thing; the message names it.
    """
    values = {name: _value(name, image, columns, caption_file) for name in variables_of(prompt)}
    return _VARIABLE.sub(lambda match: values[match[2]] if match[2] else "{" + match[1] + "}", prompt)


def _value(name: str, image: ImageRef | None, columns: Mapping, caption_file: str) -> str:
    if image is None:
        raise DataError(f"the image comes from no file, and the prompt asks for its {{{name}}}")
    path = PurePosixPath(image.name.replace("\\", "/"))
    own = {"name": path.name, "stem": path.stem, "folder": path.parent.name or image.path.parent.name}
    value = _text(columns.get(name)) or own.get(name) or (_tags(image, caption_file) if name == "tags" else "")
    if not value:
        files = f", and no {path.stem}.tags or {path.stem}.txt with tags lies beside it" if name == "tags" else ""
        there = "its columns are " + ", ".join(map(str, columns)) if columns else "no row of data names it"
        raise DataError(f"{image.name!r} has no {name}, which the prompt asks for by {{{name}}}: {there}{files}")
    return value


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, map(_text, value)))
    return str(value).strip() if isinstance(value, str | int | float) and not isinstance(value, bool) else ""


def _tags(image: ImageRef, caption_file: str) -> str:
    if image.embedded:
        return ""
    for suffix in TAGS:
        file = image.path.with_suffix(suffix)
        depend_on(file)
        if suffix == caption_file.lower() or not file.is_file():
            continue
        if file.is_symlink() or file.stat().st_size > MAX_TEXT_BYTES:
            raise DataError(
                f"{file.name!r} is a link, or of more than {MAX_TEXT_BYTES:,} bytes; expected a file of tags"
            )
        return " ".join(decode_text(read_regular_file(file, file.name), file.name).split())
    return ""
