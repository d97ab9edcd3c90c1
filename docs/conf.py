"""How Sphinx builds the documentation: `make docs`, into build/docs. Broken links and bad docstrings fail."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vlm_lora import __version__  # noqa: E402  # after the path to it
from vlm_lora.config import KNOBS  # noqa: E402

project = "vlm-lora"
author = "The vlm-lora authors"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
root_doc = "index"
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "vlm-lora"
html_show_sourcelink = False
nitpicky = False

myst_heading_anchors = 3  # as on GitHub, so that the same links work in both places
myst_enable_extensions = ["colon_fence"]
copybutton_exclude = ".linenos, .gp"

default_role = "code"  # `name` in a docstring
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_default_options = {"undoc-members": True}
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_use_ivar = True  # or a field would be listed twice
napoleon_numpy_docstring = False


COLON = "\ufffc"
"""Stands for a colon in the text of a field while napoleon, which takes the words before one for a type, reads it."""


def describe_field(app, what, name, thing, options, lines: list[str]) -> None:
    """The fields of TrainConfig get their text from the table that `--help` is made from."""
    owner, _, field = name.rpartition(".")
    if owner.endswith(".TrainConfig") and field in KNOBS:
        knob = KNOBS[field]
        said = [knob.help[0].upper() + knob.help[1:] + "."]
        said += [f"One of {', '.join(knob.choices)}."] if knob.choices else []
        said += [f"{str(knob.bounds).capitalize()}."] if knob.bounds else []
        text = re.sub(r"([*|`_])", r"\\\1", " ".join(said))
        lines[:] = [re.sub(r"(--[a-z-]+)", r"``\1``", text)]
    if what in ("attribute", "property"):
        lines[:] = [line.replace(":", COLON) for line in lines]


def restore_colons(app, what, name, thing, options, lines: list[str]) -> None:
    lines[:] = [line.replace(COLON, ":") for line in lines]


def setup(app) -> None:
    app.connect("autodoc-process-docstring", describe_field, priority=400)  # before napoleon, whose priority is 500
    app.connect("autodoc-process-docstring", restore_colons, priority=600)
