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

from vlm_lora.demo.changed import WhatChanged
from vlm_lora.demo.folder import WholeFolder
from vlm_lora.demo.inputs import plainly
from vlm_lora.demo.runs import Evaluations, Pictures
from vlm_lora.demo.sheet import Albums
from vlm_lora.demo.speaker import MAX_WAITING, Speaker
from vlm_lora.demo.tabs import QUIETLY, Desk, OnePicture, choices
from vlm_lora.demo.training import Training
from vlm_lora.demo.uploads import KEPT_SECONDS, UPLOADS, Roots, short

if TYPE_CHECKING:
    from vlm_lora import Captioner

STYLE, SCRIPT = (resources.files("vlm_lora.demo").joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
STYLE += resources.files("vlm_lora.inference").joinpath("templates/learning.css").read_text("utf-8")

IF_OPEN = """adapter => {
  if (!document.querySelector('#changed')?.offsetParent) throw new Error('nobody looks');
  return adapter;
}"""


class Page(gr.Blocks):
    """Gradio's blocks, whose `close` also leaves the contexts in ``at_close``: folders, the environment. What is asked
    and goes wrong is told in a sentence, without the paths ``of_this_machine``."""

    def __init__(self, **settings):
        self.at_close = ExitStack()
        self.of_this_machine: list[Path] = []
        telemetry = "HF_HUB_DISABLE_TELEMETRY"  # gradio switches it off for the whole process
        self.at_close.callback(set_variable, telemetry, os.environ.get(telemetry))
        super().__init__(**settings)

    def close(self, verbose: bool = False) -> None:
        super().close(verbose=verbose)
        self.at_close.close()

    async def process_api(self, *given, **more) -> dict[str, Any]:
        try:
            return await super().process_api(*given, **more)
        except Exception as error:
            told = plainly(error)
            told.message = short(told.message, *self.of_this_machine)
            raise told from None


def set_variable(name: str, value: str | None) -> None:
    """Set an environment variable, or remove it."""
    os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value


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
    future: Future = captioner if isinstance(captioner, Future) else Future()
    if future is not captioner:
        future.set_result(captioner)
    runs, started = dict(runs or {}), time.monotonic()

    with Page(title="vlm-lora", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as app:
        files = tempfile.TemporaryDirectory(prefix="vlm-lora-pictures-", ignore_cleanup_errors=True)
        pictures = Pictures(Path(app.at_close.enter_context(files)))
        roots, place = training or (Roots([], pictures.folder / UPLOADS, passing=True), None)
        app.of_this_machine = [roots.uploads, *roots.folders.values(), *([place] if place else []), *runs.values()]
        gr.Markdown("# What does the model say?")
        bare: dict[str, Any] = {"show_label": False, "container": False, "interactive": False, "elem_id": "status"}
        text = f"Loading {loading}. You can choose a picture already."
        status = gr.Textbox(text, visible=not future.done(), **bare)
        several = [*runs] != [chosen] and bool(runs)
        adapter = gr.Dropdown(choices(runs, chosen), value=chosen, label="Adapter", visible=several)
        desk = Desk(runs, Speaker(future, runs, chosen), Evaluations(runs), pictures, adapter, app.at_close)
        with gr.Tabs(selected="picture" if chosen or not training else "train"):
            albums = Albums(roots)
            if place:
                with gr.Tab("Train", id="train"):
                    Training(app, desk, albums, place)
            with gr.Tab("Picture", id="picture"):
                one = OnePicture(desk)
            with gr.Tab("Pictures"):
                folder = WholeFolder(app, desk, albums)
            with gr.Tab("What changed") as changed_opened:
                changed = WhatChanged(desk)

        timer = gr.Timer(1, active=not future.done())
        outputs = [status, timer, *one.outputs, *folder.outputs]

        def look(adapter: str) -> list:
            """How far the loading is: on opening the page, and once a second until it is done."""
            if not future.done():
                text = f"Loading {loading}: {time.monotonic() - started:.0f} s. You can choose a picture already."
                return [text, *[gr.skip()] * (len(outputs) - 1)]
            return [gr.Textbox(visible=False), gr.Timer(active=False), *one.show(adapter), *folder.show(adapter)]

        gr.on([app.load, timer.tick, adapter.change], look, adapter, outputs, queue=False, **QUIETLY)
        # An evaluation takes long to draw: that is done when somebody looks.
        shown: dict[str, Any] = {"fn": changed.show, "inputs": adapter, "outputs": changed.outputs, "queue": False}
        changed_opened.select(**shown, show_progress="minimal", api_visibility="private")
        adapter.change(**shown, js=IF_OPEN, **QUIETLY)
    app.queue(max_size=4 * MAX_WAITING, default_concurrency_limit=1)
    return app
