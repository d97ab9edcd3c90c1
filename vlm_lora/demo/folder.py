"""The tab on which all pictures of a folder are captioned, any number of them, as the command `caption` does it."""

import asyncio
import json
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from vlm_lora.demo.album import METADATA, Album
from vlm_lora.demo.inputs import UPLOADS, Roots, decoding, plain, plainly
from vlm_lora.demo.sheet import ALL, DOUBTFUL, LONGEST, WITHOUT, Sheet, chooser
from vlm_lora.demo.tabs import AT_ONCE, QUIETLY, Desk, advanced, asked_text, empty, progress, prompt_box
from vlm_lora.inference.sinks import made_with

BESIDE, ROWS = "Beside each picture, as cat.txt", f"All in {METADATA}"
EMPTY = empty("A whole folder at once.", "Choose a folder, or drop pictures. Each gets its caption beside it.")
MOST, SOON, LATE = 32, 4.0, 12.0
"""Pictures that are captioned together: more where they took fewer seconds, fewer where they took more, so that others
need not wait long for the model, nor Stop."""


@dataclass(eq=False)
class Job:
    """The pictures of a folder that had no caption. It goes on without the page."""

    album: Album
    names: list[str]
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

        private: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 1}
        opened = [work, form, make, file, state, timer, *sheet.outputs]
        for event in chosen:
            event(self.open, folder, opened, **private)
        form.input(self.open, [folder, form], opened, **private)
        go.click(self.begin, [sheet.where, self.prompt, desk.adapter, *numbers], [state, timer], **AT_ONCE)
        stop.click(self.stop, sheet.where, **AT_ONCE)
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
        from vlm_lora import Decoding  # here, as it is not quick to load

        album, decoded, asked = self._album(where), decoding(*numbers), asked_text(prompt)
        if (job := self.jobs.get(album)) and job.running:
            raise plain("This folder is being captioned already.")
        if not self.desk.speaker.first.done():
            raise plain("The model is still being loaded. Try again in a moment.")
        base = None if adapter else self.desk.speaker.first.result().backbone.name
        runs = [str(self.desk.speaker.runs.get(adapter, adapter))] if adapter else []
        how = made_with(Decoding(**decoded), runs, model=base, prompt=asked)
        names = [name for name, text in album.captions(album.pictures).items() if text == ""]
        album.sink([album.pictures[name] for name in names], how)
        if not names:
            raise plain("Every picture has a caption.")
        job = self.jobs[album] = Job(album, names)
        job.task = asyncio.create_task(self._work(job, asked, decoded, adapter, how))
        return _told(job), gr.Timer(active=True)

    async def _work(self, job: Job, prompt: str | None, numbers: dict, adapter: str, how: dict) -> None:
        size, captions = 1, []
        try:
            while job.done < len(job.names) and not job.stopped:
                batch, began = job.names[job.done : job.done + size], time.monotonic()
                images = [job.album.pictures[name] for name in batch]
                async with aclosing(self.desk.speaker.caption(images, prompt, numbers, adapter)) as answer:
                    async for said in answer:
                        job.ahead, captions = (said, []) if isinstance(said, int) else (0, said)
                        if job.stopped:
                            break
                new = dict(zip(batch, captions, strict=False))  # fewer where it was stopped
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

    def take_away(self, where: str) -> Iterator[gr.File]:
        """The pictures and their captions in a zip, as they lie in the folder: what `train` reads."""
        if not str(json.loads(where)["folder"]).startswith(f"{UPLOADS}/"):
            raise plain("The captions lie in the folder already.")
        folder = self._album(where).folder
        with tempfile.TemporaryDirectory(dir=self.desk.pictures.folder) as place:
            file = Path(place) / "captions.zip"
            with zipfile.ZipFile(file, "w") as target:  # stored: pictures are compressed already
                for path in sorted(folder.rglob("*")):
                    if path.is_file() and not path.name.startswith("."):
                        target.write(path, path.relative_to(folder))
            yield gr.File(str(file), visible=True)  # gradio takes a copy

    def _album(self, where: str) -> Album:
        self.sheet.flush()
        at = json.loads(where or "{}")
        return self.roots.album(at.get("folder", ""), at.get("rows", False))


def _told(job: Job | None) -> Markup:
    if job is None:
        return Markup("")
    kind = "learning" if job.running else "done" if job.done == len(job.names) else "stopped"
    big = f"{job.done:,} of {len(job.names):,}"
    small = [f"Waiting: {job.ahead} come first."] if job.ahead else []
    small += ["Stopped. The rest is captioned when you press the button again."] if kind == "stopped" else []
    small += [f"{len(job.wrong):,} without one: {' '.join(job.wrong[:3])}"] if job.wrong else []
    return progress(kind, "Captions", big, job.done / len(job.names), " ".join(small))
