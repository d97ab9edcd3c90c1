"""The page: an adapter to choose, and tabs over one model."""

import os
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from vlm_lora.config import DEFAULT_MAX_NEW_TOKENS
from vlm_lora.demo.changed import WhatChanged
from vlm_lora.demo.folder import WholeFolder
from vlm_lora.demo.inputs import MAX_NEW_TOKENS, Number, Slider
from vlm_lora.demo.runs import Evaluations, Pictures
from vlm_lora.demo.sheet import Albums
from vlm_lora.demo.speaker import MAX_WAITING, Speaker
from vlm_lora.demo.tabs import QUIETLY, Desk, OnePicture
from vlm_lora.demo.training import Training
from vlm_lora.demo.uploads import KEPT_SECONDS, UPLOADS, Roots

if TYPE_CHECKING:
    from vlm_lora import Captioner

STYLE, SCRIPT = (resources.files("vlm_lora.demo").joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
STYLE += resources.files("vlm_lora.inference").joinpath("templates/learning.css").read_text("utf-8")

IF_OPEN = """adapter => {
  if (!document.querySelector('#changed')?.offsetParent) throw new Error('nobody looks');
  return adapter;
}"""


class Page(gr.Blocks):
    """Gradio's blocks, whose `close` also leaves the contexts in ``at_close``: folders, the environment."""

    def __init__(self, **settings):
        self.at_close = ExitStack()
        telemetry = "HF_HUB_DISABLE_TELEMETRY"  # gradio switches it off for the whole process
        self.at_close.callback(set_variable, telemetry, os.environ.get(telemetry))
        super().__init__(**settings)

    def close(self, verbose: bool = False) -> None:
        super().close(verbose=verbose)
        self.at_close.close()


def set_variable(name: str, value: str | None) -> None:
    """Set an environment variable, or remove it."""
    os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value


def _ready(captioner: "Captioner") -> "Future[Captioner]":
    future: Future[Captioner] = Future()
    future.set_result(captioner)
    return future


def _numbers() -> list[Slider | Number]:
    """Of all tabs, and so below them."""
    return [
        Slider(1, MAX_NEW_TOKENS, DEFAULT_MAX_NEW_TOKENS, step=1, precision=0, label="Most tokens", render=False),
        Slider(0, 2, 0, step=0.05, label="Temperature (0: always the likeliest word)", render=False),
        Slider(0.05, 1, 1, step=0.05, label="Top p (only with a temperature)", render=False),
        Number(0, label="Seed", precision=0, render=False),
    ]


def build_app(
    captioner: "Captioner | Future[Captioner]",
    *,
    runs: Mapping[str, Path] | None = None,
    chosen: str = "",
    loading: str = "the model",
    training: tuple[Roots, Path] | None = None,
) -> Page:
    """The page, to be launched with `safe_settings`.

    Args:
        captioner: or a future of it, so that the page is there while it loads.
        runs: folders of the adapters that can be chosen, by name.
        chosen: which of them the captioner has; empty where it is the base alone.
        loading: what the page says is being loaded.
        training: from where pictures may be taken to train on, and where runs are written; None: nobody trains here.
    """
    future = captioner if isinstance(captioner, Future) else _ready(captioner)
    runs = dict(runs or {})
    started = time.monotonic()

    with Page(title="vlm-lora", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as app:
        files = tempfile.TemporaryDirectory(prefix="vlm-lora-pictures-", ignore_cleanup_errors=True)
        app.at_close.enter_context(files)
        gr.Markdown("# What does the model say?")
        status = gr.Textbox(
            f"Loading {loading}. You can choose a picture already.",
            visible=not future.done(),
            interactive=False,
            show_label=False,
            container=False,
            elem_id="status",
        )
        names = [(name, name) for name in runs]
        adapter = gr.Dropdown(
            names if chosen else [("none: the base alone", ""), *names],
            value=chosen,
            label="Adapter",
            visible=[*runs] != [chosen] and bool(runs),
        )
        numbers = _numbers()
        desk = Desk(
            runs, Speaker(future, runs, chosen), Evaluations(runs), Pictures(Path(files.name)), adapter, numbers
        )
        with gr.Tabs(selected="picture" if chosen or not training else "train"):
            roots, place = training or (Roots([], Path(files.name) / UPLOADS, passing=True), None)
            albums = Albums(roots)
            if place:
                with gr.Tab("Train", id="train"):
                    Training(app, desk, albums, place)
            with gr.Tab("Picture", id="picture"):
                one = OnePicture(desk)
            with gr.Tab("Pictures"):
                several = WholeFolder(app, desk, albums)
            with gr.Tab("What changed") as changed_opened:
                changed = WhatChanged(desk)
        with gr.Accordion("Advanced: length and sampling", open=False):
            for number in numbers:
                number.render()

        timer = gr.Timer(1, active=not future.done())
        outputs = [status, timer, *one.outputs, *several.outputs]

        def look(adapter: str):
            """How far the loading is: on opening the page, and once a second until it is done."""
            if not future.done():
                text = f"Loading {loading}: {time.monotonic() - started:.0f} s. You can choose a picture already."
                return [text, *[gr.skip()] * (len(outputs) - 1)]
            return [gr.Textbox(visible=False), gr.Timer(active=False), *one.show(adapter), *several.show(adapter)]

        gr.on([app.load, timer.tick, adapter.change], look, adapter, outputs, queue=False, **QUIETLY)
        # An evaluation takes long to draw: that is done when somebody looks.
        shown: dict[str, Any] = {"fn": changed.show, "inputs": adapter, "outputs": changed.outputs, "queue": False}
        changed_opened.select(**shown, show_progress="minimal", api_visibility="private")
        adapter.change(**shown, js=IF_OPEN, **QUIETLY)
    app.queue(max_size=4 * MAX_WAITING, default_concurrency_limit=1)
    return app
