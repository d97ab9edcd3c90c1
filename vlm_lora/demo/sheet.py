"""Pictures beside their captions, a page at a time. What is typed is saved when there is a pause, and can be undone."""

import asyncio
import base64
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import gradio as gr
from markupsafe import Markup

from vlm_lora.demo.album import MOST_CHARACTERS, Album
from vlm_lora.demo.inputs import Roots, SafeFiles, plain
from vlm_lora.demo.speaker import MAX_PAGES
from vlm_lora.demo.tabs import QUIETLY, Desk

CARDS = 12
"""Pictures on a page."""
PAUSE = 0.5
"""Seconds without another key after which what is typed is written."""
ALL, WITHOUT, LONGEST, DOUBTFUL, NOTICED = "All", "Without caption", "Longest first", "Worst by review", "Look at these"
NONE_OF = {
    WITHOUT: "Every picture has a caption.",
    DOUBTFUL: "These captions were not reviewed: vlm-lora eval FOLDER --adapter RUN --review --output RUN does that, "
    "where RUN is the adapter's run folder.",
    NOTICED: "Nothing was noticed: no picture is there twice, or looks like another.",
}
# Gradio's `input` (6.31) passes over what is pasted or deleted; `change` also tells of what the server has written.
SAVE = """(where, text) => {
  if (document.activeElement?.value !== text) throw new Error('nobody typed this');
  return [JSON.stringify({...JSON.parse(where), card: %d, at: performance.now()}), text];
}"""

STEP = "where => { const at = JSON.parse(where); return JSON.stringify({...at, page: at.page + %d}); }"


@dataclass(eq=False)
class View:
    """What one open page looks at: the pictures in order, what is noted of them, and what it has changed."""

    names: list[str] = field(default_factory=list)
    notes: Mapping[str, str] = field(default_factory=dict)
    changes: list[tuple[Album, str, str | None, str | None]] = field(default_factory=list)
    typed: dict[str, tuple[float, asyncio.Event]] = field(default_factory=dict)


def chooser(app: gr.Blocks, roots: Roots, label: str, name: str) -> tuple[gr.Dropdown, tuple[Callable, Callable]]:
    """A folder, or files to drop, which become one; and the events after which it is to be opened."""
    visible, told = bool(roots.folders) or "hidden", "A folder of this machine"
    folder = gr.Dropdown([], value=None, label=told, allow_custom_value=True, visible=visible)
    files = SafeFiles(label=label, file_count="multiple", height=140, elem_id=name)
    app.load(lambda: gr.Dropdown(choices=roots.names()), None, folder, queue=False, **QUIETLY)
    taken = files.upload(roots.take_in, files, folder, api_visibility="private", concurrency_limit=1)
    return folder, (folder.input, taken.success)


class Sheet:
    """``open`` gives a value for each of ``outputs``; ``where`` says, in the browser, what is on the page, so that what
    is typed is never taken for the caption of another picture."""

    def __init__(self, desk: Desk, roots: Roots, orders: Sequence[str]):
        self.desk, self.roots = desk, roots
        self.views = lru_cache(MAX_PAGES)(lambda page: View())
        self.waiting: dict[tuple[View, Album, str], str] = {}
        self.writing = threading.Lock()
        desk.at_close.callback(self.flush)
        with gr.Column(visible=False) as all_of_it:
            order = gr.Radio(list(orders), value=ALL, label="Order", show_label=False, container=False)
            head = gr.HTML(Markup(""), elem_classes="head")
            cards, pictures, self.texts = [], [], []
            with gr.Column(elem_classes="album"):
                for _ in range(CARDS):
                    with gr.Column(visible=False, min_width=200) as card:
                        cards.append(card)
                        pictures.append(gr.HTML(Markup("")))
                        box = gr.Textbox("", lines=3, max_lines=12, max_length=MOST_CHARACTERS, interactive=True)
                        self.texts.append(box)
            with gr.Row(elem_classes="steps"):
                back, on = (gr.Button(text, min_width=140, scale=0) for text in ("Previous page", "Next page"))
                undo = gr.Button("Undo", min_width=80, scale=0)
                saved = gr.HTML(Markup(""), elem_classes="saved")
        self.where = gr.Textbox("", visible="hidden")
        self.outputs = [all_of_it, order, head, self.where, saved, *cards, *pictures, *self.texts]

        private: dict[str, Any] = {"queue": False} | QUIETLY
        order.input(self.turn, [self.where, order, desk.adapter], self.outputs, **private)
        for button, step in ((back, -1), (on, 1)):
            button.click(self.leaf, self.where, self.outputs, js=STEP % step, **private)
        undo.click(self.undo, self.where, self.outputs, **private)
        for i, text in enumerate(self.texts):
            text.change(self.save, [self.where, text], saved, js=SAVE % i, trigger_mode="multiple", **private)

    def open(self, name: str, rows: bool, page: str | None, notes: Mapping[str, str] | None = None) -> list:
        """A folder from its first page on; ``notes``: what there is to say of some pictures. Raises VlmLoraError."""
        self.roots.album(name, rows, anew=True)
        view = self.views(page)
        view.notes = notes or {}
        return self._show({"folder": name, "rows": rows, "page": 0}, view, ALL)

    def turn(self, where: str, order: str, adapter: str, request: gr.Request) -> list:
        """The same folder in another order."""
        return self._show(json.loads(where) | {"page": 0}, self.views(request.session_hash), order, adapter)

    def leaf(self, where: str, request: gr.Request) -> list:
        """Another page of it."""
        return self._show(json.loads(where), self.views(request.session_hash))

    async def save(self, where: str, text: str, request: gr.Request) -> Markup | dict:
        """Write what is typed when there is a pause, in a thread, also for a page that is closed meanwhile."""
        at, view = json.loads(where), self.views(request.session_hash)
        name = at["names"][at["card"]]
        latest, another = view.typed.get(name, (0.0, asyncio.Event()))
        if at["at"] < latest:  # it comes after what was typed later
            return gr.skip()
        another.set()  # as a browser has few requests open at a time, none waits for its pause in vain
        mine = view.typed[name] = at["at"], asyncio.Event()
        self.waiting[view, self.roots.album(at["folder"], at["rows"]), name] = text
        written = None
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(mine[1].wait(), PAUSE)
        finally:
            if view.typed[name] is mine:
                written = asyncio.get_running_loop().run_in_executor(None, self.flush)
        if written is None:
            return gr.skip()
        await written
        return Markup("<p>Saved: {}</p>").format(name)

    def flush(self) -> None:
        """Write at once what was typed."""
        with self.writing:
            while self.waiting:
                (view, album, name), text = self.waiting.popitem()
                if album.captions([name])[name] == text.strip():
                    continue
                before, after = album.save(name, text)
                if view.changes and view.changes[-1][:2] == (album, name):
                    before = view.changes.pop()[2]  # one change, however many keys it took
                view.changes.append((album, name, before, after))

    def undo(self, where: str, request: gr.Request) -> list:
        self.flush()
        view = self.views(request.session_hash)
        if not view.changes:
            raise plain("There is nothing to undo.")
        album, name, before, after = view.changes.pop()

        def back(now: str | None) -> str | None:
            if now != after:
                raise plain(f"{name} has another caption since, which stays.")
            return before

        album.change(name, back)
        return self._show(json.loads(where), view, said=f"As it was: {name}")

    # -- inside --------------------------------------------------------------------------------------------------

    def _show(self, at: dict, view: View, order: str | None = None, adapter: str = "", said: str = "") -> list:
        """The page ``at``; with an ``order``, all pictures are put in it first, and stay in it while pages turn."""
        self.flush()
        album, head = self.roots.album(at["folder"], at["rows"]), gr.skip()
        if order:
            captions = album.captions(album.pictures)
            view.names = self._in_order(album, captions, order, adapter, view)
            without = sum(text == "" for text in captions.values())
            told = f"{without:,} without a caption." if without else "Each has a caption."
            told = f"{told} What you type is saved in the folder at once."
            none = "" if view.names else NONE_OF.get(order, "No pictures here.")
            line = Markup('<p><b>{:,} pictures.</b> {}</p><p class="lead">{}</p>')
            head = line.format(len(captions), told, none)
        last = max(0, -(-len(view.names) // CARDS) - 1)
        page = min(max(0, at["page"]), last)
        names = view.names[page * CARDS : (page + 1) * CARDS]
        where = {"folder": at["folder"], "rows": at["rows"], "page": page, "names": names}
        told = Markup("<p>{}</p>").format(said or (f"Page {page + 1:,} of {last + 1:,}" if last else ""))
        texts = [
            gr.Textbox(text or "", label=name, info=view.notes.get(name), interactive=text is not None)
            for name, text in album.captions(names).items()
        ]
        left = CARDS - len(names)
        shown = [gr.Column(visible=True), order or gr.skip(), head, json.dumps(where), told]
        shown += [gr.Column(visible=i < len(names)) for i in range(CARDS)]
        return [*shown, *(self._picture(album, name) for name in names), *[""] * left, *texts, *[gr.Textbox("")] * left]

    def _in_order(self, album: Album, captions: Mapping[str, str | None], order: str, adapter: str, view: View) -> list:
        """The names of the pictures to show."""
        if order == DOUBTFUL:
            by_path = {image.path.resolve(): name for name, image in album.pictures.items()}
            rows = [(by_path.get(image.path.resolve()), row) for row, image in self.desk.evaluations.reviewed(adapter)]
            view.notes = {name: f"{row['score']:+.2f} a token for “{row['caption']}”" for name, row in rows if name}
        if order in (DOUBTFUL, NOTICED):
            return [name for name in view.notes if name in captions]
        if order == LONGEST:
            return sorted(captions, key=lambda name: -len(captions[name] or ""))
        return [name for name, text in captions.items() if order != WITHOUT or text == ""]

    def _picture(self, album: Album, name: str) -> Markup:
        file = self.desk.pictures.file(album.pictures[name], small=True)
        if file is None:
            return Markup('<p class="gone">This picture cannot be read.</p>')
        data = base64.b64encode(file.read_bytes()).decode()
        return Markup('<img alt="{}" src="data:image/{};base64,{}">').format(name, file.suffix[1:], data)
