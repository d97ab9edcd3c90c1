"""Pictures beside their captions, a page at a time: what is typed is saved when there is a pause, and can be undone.
And the tab on which all pictures of a folder are captioned, any number of them, as the command `caption` does it."""

import asyncio
import base64
import json
import threading
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import gradio as gr
from markupsafe import Markup

from vlm_lora import Decoding, ImageRef
from vlm_lora.demo.folders import METADATA, MOST_CHARACTERS, UPLOADS, Album, Roots
from vlm_lora.demo.inputs import advanced, asked_text, decoding, from_their_machine, many_pictures, plainly, prompt_box
from vlm_lora.demo.speaker import MAX_PAGES
from vlm_lora.demo.tabs import AT_ONCE, IN_ORDER, QUIETLY, Desk, empty, progress
from vlm_lora.errors import ConfigError, DataError
from vlm_lora.inference.sinks import made_with

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
BESIDE, ROWS = "Beside each picture, as cat.txt", f"All in {METADATA}"
EMPTY = empty("A whole folder at once.", "Choose a folder, or drop pictures. Each gets its caption beside it.")
MOST, SOON, LATE = 32, 4.0, 12.0
"""Pictures that are captioned together: more where they took fewer seconds, fewer where they took more, so that others
need not wait long for the model, nor Stop."""


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
    files = from_their_machine(gr.File(label=label, file_count="multiple", height=140, elem_id=name), many_pictures)
    app.load(lambda: gr.Dropdown(choices=roots.names()), None, folder, queue=False, **QUIETLY)
    taken = files.upload(roots.take_in, files, folder, api_visibility="private")
    return folder, (folder.input, taken.success)


class Sheet:
    """``open`` gives a value for each of ``outputs``; ``where`` says, in the browser, what is on the page, so that what
    is typed is never taken for the caption of another picture."""

    def __init__(self, desk: Desk, roots: Roots, orders: Sequence[str]):
        self.desk, self.roots = desk, roots
        self.views = lru_cache(MAX_PAGES)(lambda page: View())
        self.waiting: dict[tuple[View, str, bool, str], str] = {}
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

        order.input(self.turn, [self.where, order, desk.adapter], self.outputs, **IN_ORDER)
        for button, step in ((back, -1), (on, 1)):
            button.click(self.turn, self.where, self.outputs, js=STEP % step, **IN_ORDER)
        undo.click(self.undo, self.where, self.outputs, **IN_ORDER)
        for i, text in enumerate(self.texts):
            text.change(self.save, [self.where, text], saved, js=SAVE % i, **AT_ONCE)

    def open(self, name: str, rows: bool, page: str | None, notes: Mapping[str, str] | None = None) -> list:
        """A folder from its first page on; ``notes``: what there is to say of some pictures. Raises VlmLoraError."""
        self.roots.album(name, rows, anew=True)
        view = self.views(page)
        view.notes = notes or {}
        return self._show({"folder": name, "rows": rows}, view, ALL)

    def turn(self, where: str, request: gr.Request, order: str | None = None, adapter: str = "") -> list:
        """Another page of the same folder; the first one in another order."""
        return self._show(json.loads(where), self.views(request.session_hash), order, adapter)

    async def save(self, where: str, text: str, request: gr.Request) -> Markup | dict:
        """Write what is typed when there is a pause, in a thread, also for a page that is closed meanwhile."""
        at, view = json.loads(where), self.views(request.session_hash)
        name = at["names"][at["card"]]
        latest, another = view.typed.get(name, (0.0, asyncio.Event()))
        if at["at"] < latest:  # it comes after what was typed later
            return gr.skip()
        another.set()  # as a browser has few requests open at a time, none waits for its pause in vain
        mine = view.typed[name] = at["at"], asyncio.Event()
        self.waiting[view, at["folder"], at["rows"], name] = text
        written = None
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(mine[1].wait(), PAUSE)
        finally:
            if view.typed[name] is mine:
                written = asyncio.get_running_loop().run_in_executor(None, self.flush)
        if written is None:
            return gr.skip()
        try:
            await written
        except DataError as error:  # which gradio (6.31) does not show of an event that passes over its queue
            return Markup("<p>Not saved: {}</p>").format(error)
        return Markup("<p>Saved: {}</p>").format(name)

    def flush(self) -> None:
        """Write at once what was typed."""
        with self.writing:
            while self.waiting:
                (view, folder, rows, name), text = self.waiting.popitem()
                album = self.roots.album(folder, rows)
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
            raise ConfigError("There is nothing to undo.")
        album, name, before, after = view.changes.pop()

        def back(now: str | None) -> str | None:
            if now != after:
                raise ConfigError(f"{name} has another caption since, which stays.")
            return before

        album.change(name, back)
        return self._show(json.loads(where), view, said=f"As it was: {name}")

    # -- inside --------------------------------------------------------------------------------------------------

    def _show(self, at: dict, view: View, order: str | None = None, adapter: str = "", said: str = "") -> list:
        """The page ``at``; with an ``order`` the first, in which all pictures are put, and stay while pages turn."""
        self.flush()
        album, head = self.roots.album(at["folder"], at["rows"]), gr.skip()
        if order:
            captions = album.captions(album.pictures)
            view.names = self._in_order(album, captions, order, adapter, view)
            without = sum(text == "" for text in captions.values())
            told = f"{without:,} without a caption." if without else "Each has a caption." if captions else ""
            told = f"{told} What you type is saved in the folder at once."
            none = "" if view.names else NONE_OF.get(order, "No pictures here.")
            head = Markup('<p><b>{:,} pictures.</b> {}</p><p class="lead">{}</p>').format(len(captions), told, none)
        last = max(0, -(-len(view.names) // CARDS) - 1)
        page = 0 if order else min(max(0, at["page"]), last)
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
        image = album.pictures.get(name)
        file = image and self.desk.pictures.file(image, small=True)
        if file is None:
            return Markup('<p class="gone">This picture cannot be read.</p>')
        data = base64.b64encode(file.read_bytes()).decode()
        return Markup('<img alt="{}" src="data:image/{};base64,{}">').format(name, file.suffix[1:], data)


@dataclass(eq=False)
class Job:
    """The pictures of a folder that had no caption. It goes on without the page."""

    album: Album
    images: list[ImageRef]
    done: int = 0
    ahead: int = 0
    wrong: list[str] = field(default_factory=list)
    running: bool = True
    stopped: bool = False
    task: asyncio.Task | None = None


class WholeFolder:
    """All pictures of a folder, and their captions as they come."""

    def __init__(self, app: gr.Blocks, desk: Desk, roots: Roots):
        self.desk, self.roots = desk, roots
        self.jobs: dict[Album, Job] = {}
        with gr.Row():
            with gr.Column(min_width=300):
                folder, chosen = chooser(app, roots, "Pictures, or a zip of them", "files")
            with gr.Column(min_width=300, scale=2):
                state = gr.HTML(EMPTY, elem_id="captioned")
                with gr.Column(visible=False) as work:
                    form = gr.Radio([BESIDE, ROWS], value=BESIDE, label="Where captions go")
                    self.prompt = prompt_box()
                    numbers = advanced()
                    with gr.Row():
                        go = gr.Button("Caption those without one", variant="primary", min_width=120)
                        stop = gr.Button("Stop", min_width=80, scale=0)
                        make = gr.Button("Take away", min_width=80, scale=0)
                    file = gr.File(label="Download", interactive=False, visible=False, elem_id="download")
        self.sheet = sheet = Sheet(desk, roots, (ALL, WITHOUT, LONGEST, DOUBTFUL))
        timer = gr.Timer(1, active=False)

        opened = [work, form, make, file, state, timer, *sheet.outputs]
        for event in chosen:
            event(self.open, folder, opened, api_visibility="private")
        form.input(self.open, [folder, form], opened, api_visibility="private")
        go.click(self.begin, [sheet.where, self.prompt, desk.adapter, *numbers], [state, timer], **IN_ORDER)
        stop.click(self.stop, sheet.where, **IN_ORDER)
        timer.tick(self.tick, [sheet.where, *sheet.texts], [state, timer, *sheet.texts], queue=False, **QUIETLY)
        make.click(self.take_away, sheet.where, file, api_visibility="private")

    def open(self, name: str | None, request: gr.Request, form: str = "") -> list:
        """The folder of that name; its captions in this form, or that which they have already."""
        rows = form == ROWS if form else (self.roots.folder(name) / METADATA).is_file()
        shown = self.sheet.open(str(name), rows, request.session_hash)
        job = self.jobs.get(self.roots.album(str(name), rows))
        mine = gr.Button(visible=str(name).startswith(f"{UPLOADS}/"))  # a folder of theirs they have already
        work = [gr.Column(visible=True), ROWS if rows else BESIDE, mine, gr.File(visible=False)]
        return [*work, _told(job), gr.Timer(active=bool(job and job.running)), *shown]

    async def begin(self, where: str, prompt: str, adapter: str, *numbers: Any) -> tuple[Markup, gr.Timer]:
        """Caption what has no caption, from where it stopped."""
        album, decoded, asked = self._album(where), decoding(*numbers), asked_text(prompt)
        if (job := self.jobs.get(album)) and job.running:
            raise ConfigError("This folder is being captioned already.")
        if not self.desk.speaker.first.done():
            raise ConfigError("The model is still being loaded. Try again in a moment.")
        base = None if adapter else self.desk.speaker.first.result().backbone.name
        runs = [str(self.desk.speaker.runs.get(adapter, adapter))] if adapter else []
        how = made_with(decoded, runs, model=base, prompt=asked)
        images = [album.pictures[name] for name, text in album.captions(album.pictures).items() if text == ""]
        album.sink(images, how)
        if not images:
            raise ConfigError("There is no picture without a caption.")
        job = self.jobs[album] = Job(album, images)
        job.task = asyncio.create_task(self._work(job, asked, decoded, adapter, how))
        return _told(job), gr.Timer(active=True)

    async def _work(self, job: Job, prompt: str | None, decoded: Decoding, adapter: str, how: dict) -> None:
        size, captions = 1, []
        try:
            while job.done < len(job.images) and not job.stopped:
                batch, began = job.images[job.done : job.done + size], time.monotonic()
                async with aclosing(self.desk.speaker.caption(batch, prompt, decoded, adapter)) as answer:
                    async for said in answer:
                        job.ahead, captions = (said, []) if isinstance(said, int) else (0, said)
                        if job.stopped:
                            break
                new = {
                    image.name: said for image, said in zip(batch, captions, strict=False)
                }  # fewer where it was stopped
                job.wrong += await asyncio.to_thread(job.album.write, new, how)
                job.done, took = job.done + len(new), time.monotonic() - began
                size = min(MOST, 2 * size) if took < SOON else max(1, size // 2) if took > LATE else size
        except Exception as error:
            job.wrong.append(str(plainly(error).message))
        finally:
            job.running = False

    async def stop(self, where: str) -> None:
        if job := self.jobs.get(self._album(where)):
            job.stopped = True

    def tick(self, where: str, *texts: str) -> list:
        """How far it is; and captions that have come, where nobody has typed one meanwhile."""
        album = self._album(where)
        job, left = self.jobs.get(album), [gr.skip()] * len(texts)
        captions = [text or gr.skip() for text in album.captions(json.loads(where)["names"]).values()] if job else []
        new = [gr.skip() if text else caption for text, caption in zip(texts, captions + left, strict=False)]
        return [_told(job), gr.Timer(active=bool(job and job.running)), *new]

    def take_away(self, where: str) -> gr.File:
        """The pictures and their captions in a zip, as they lie in the folder: what `train` reads."""
        if not str(json.loads(where)["folder"]).startswith(f"{UPLOADS}/"):
            raise ConfigError("The captions lie in the folder already.")
        folder, file = self._album(where).folder, self.desk.pictures.folder / "captions.zip"
        with zipfile.ZipFile(file, "w") as target:  # stored: pictures are compressed already
            for path in sorted(folder.rglob("*")):
                if path.is_file() and not path.name.startswith("."):
                    target.write(path, path.relative_to(folder))
        return gr.File(str(file), visible=True)  # gradio takes a copy, before it lets the next one in

    def _album(self, where: str) -> Album:
        self.sheet.flush()
        at = json.loads(where or "{}")
        return self.roots.album(at.get("folder", ""), at.get("rows", False))


def _told(job: Job | None) -> Markup:
    if job is None:
        return Markup("")
    kind = "learning" if job.running else "done" if job.done == len(job.images) else "stopped"
    big = f"{job.done:,} of {len(job.images):,}"
    small = [f"Waiting: {job.ahead} come first."] if job.ahead else []
    small += ["Stopped. The rest is captioned when you press the button again."] if kind == "stopped" else []
    small += [f"{len(job.wrong):,} without one: {' '.join(job.wrong[:3])}"] if job.wrong else []
    return progress(kind, "Captions", big, job.done / len(job.images), " ".join(small))
