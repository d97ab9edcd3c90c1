"""Pages from the templates in ``templates``; in HTML and SVG every value is escaped that is not `Markup`."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

TEMPLATES = Environment(
    loader=PackageLoader("vlm_lora.inference"),
    autoescape=select_autoescape(["html", "svg"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def render(template: str, **values: Any) -> Markup:
    return Markup(TEMPLATES.get_template(template).render(values))
