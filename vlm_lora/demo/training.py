"""The tab on which a person trains: pictures in, captions corrected, what it costs, Train; and how it goes."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup, escape

from vlm_lora import ImageRef, TrainConfig, VlmLoraError
from vlm_lora.demo.album import METADATA, Album
from vlm_lora.demo.inputs import plain
from vlm_lora.demo.runs import Evaluations, pictures_of, started_in
from vlm_lora.demo.sheet import ALL, LONGEST, NOTICED, WITHOUT, Albums, Sheet, chooser
from vlm_lora.demo.tabs import AT_ONCE, QUIETLY, Desk, empty, progress
from vlm_lora.demo.trainer import State, Trainer, ask
from vlm_lora.demo.uploads import short, stem_of
from vlm_lora.errors import ConfigError, DataError

CHECKPOINTS = 6
"""Of a run from the page, so that there is something to watch."""
OFTEN, SELDOM = 2, 10
"""Seconds between two looks at the run, while it learns and while it does not."""
EMPTY = empty(
    "Nothing has been trained here yet.",
    "Choose pictures, look at their captions, and press Train. Then this shows how the model learns them.",
)


class Training:
    """``show(adapter)`` gives, as every tab's does, a value for each of ``outputs``."""

    def __init__(self, app: gr.Blocks, desk: Desk, albums: Albums, place: Path):
        self.desk, self.albums, self.trainer, self.place = desk, albums, Trainer(place), place
        chosen, seen, drawn = (gr.Textbox("", visible="hidden") for _ in range(3))
        with gr.Row():
            with gr.Column(min_width=300):
                folder, files = chooser(app, albums.roots, "Pictures and their texts, or a zip", "data")
                found = gr.HTML(Markup(""), elem_id="found")
            with gr.Column(min_width=300, scale=2):
                state = gr.HTML(EMPTY, elem_id="run")
                with gr.Row():
                    stop = gr.Button("Stop", visible=False, min_width=80)
                    resume = gr.Button("Resume", variant="primary", visible=False, min_width=80)
                learning = gr.HTML(Markup(""), elem_id="learning")
        with gr.Column(visible=False) as work:
            with gr.Row():
                epochs = gr.Slider(1, 100, TrainConfig(data="").epochs, step=1, label="Times through the pictures")
                rate = gr.Number(TrainConfig(data="").lr, label="Learning rate")
            with gr.Row():
                count = gr.Button("What will it cost?")
                train = gr.Button("Train", variant="primary")
            cost = gr.HTML(Markup(""), elem_id="cost")
        self.sheet = Sheet(desk, albums, (ALL, NOTICED, WITHOUT, LONGEST))

        private: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 1}
        shown = [chosen, found, work, cost, *self.sheet.outputs]
        folder.input(self.look_at, folder, shown, **private)
        files.upload(self.take_in, files, shown, **private)
        count.click(self.cost, [chosen, epochs, rate], cost, **private)
        train.click(self.train, [chosen, epochs, rate], cost, show_progress="minimal", **private)
        stop.click(self.stop, **AT_ONCE)
        resume.click(self.resume, **AT_ONCE)
        timer = gr.Timer(SELDOM)
        self.outputs = [seen, drawn, state, learning, stop, resume, desk.adapter, timer]
        told = [app.load, timer.tick, train.click, resume.click, stop.click]
        gr.on(told, self.tell, [seen, drawn, desk.adapter], self.outputs, queue=False, **QUIETLY)

    # -- before --------------------------------------------------------------------------------------------------

    def take_in(self, files: list[ImageRef], request: gr.Request) -> Iterator[list]:
        try:
            name = self.albums.roots.take_in(files)
        except VlmLoraError as error:
            raise plain(str(error)) from None
        yield from self.look_at(name, request)

    def look_at(self, name: str | None, request: gr.Request) -> Iterator[list]:
        """What `check` finds, in words, and the captions."""
        yield ["", Markup("<p>Looking at the pictures …</p>"), *[gr.skip()] * (2 + len(self.sheet.outputs))]
        facts, wrong, album, name = {}, "", None, str(name or "")
        pages: list = [gr.Column(visible=False), *[gr.skip()] * (len(self.sheet.outputs) - 1)]
        try:
            folder = self.albums.roots.folder(name)
        except DataError as error:
            raise plain(str(error)) from None
        try:
            facts = ask("check", str(folder))
        except DataError as error:
            wrong = short(str(error), folder)
        rows = (folder / METADATA).is_file()
        try:
            album = self.albums.of(name, rows, anew=True)
            written = any(album.captions(album.pictures).values())
            if facts and not (written and facts["format"] == ("imagefolder" if rows else "sidecar")):
                album = None  # what is said is elsewhere
            else:
                pages = self.sheet.open(name, rows, request.session_hash, _noticed(facts))
        except VlmLoraError as error:
            album, wrong = None, str(error)
        yield [name, _in_words(facts, wrong, album), gr.Column(visible=True), Markup(""), *pages]

    def _flags(self, epochs: Any, rate: Any) -> list[str]:
        model = self.desk.speaker.first.result().backbone.name
        try:
            TrainConfig(data="", epochs=float(epochs), lr=float(rate))
        except (TypeError, ValueError):
            raise ConfigError("--epochs and --lr: expected numbers") from None
        return ["--model", model, "--epochs", f"{float(epochs):g}", "--lr", f"{float(rate):g}"]

    def cost(self, chosen: str, epochs: Any, rate: Any) -> Markup:
        """What `plan` says: time and memory."""
        try:
            plan = ask("plan", str(self._folder(chosen)), *self._flags(epochs, rate))
        except VlmLoraError as error:
            raise plain(short(str(error), self.place, self._folder(chosen))) from None
        seconds = plan["step_seconds"] + plan["tower_seconds"] + plan["held_out_seconds"]
        memory, room = plan["memory"] / 1e9, plan["device_memory"] / 1e9
        return Markup('<p class="lead">About {}</p><p>{:,} steps; {:.1f} GB of {:.1f} GB of memory. {}</p>').format(
            _duration(seconds), plan["cost"]["steps"], memory, room, " ".join(plan["advice"])
        )

    def train(self, chosen: str, epochs: Any, rate: Any) -> Markup:
        """Begin it: the command, in a process of its own."""
        try:
            flags, folder = self._flags(epochs, rate), str(self._folder(chosen))
            config = TrainConfig(data=folder, epochs=float(epochs))
            steps = int(ask("check", folder)["answers"] * (1 - config.val_split) * config.epochs / config.batch_size)
            flags += ["--save-every", str(max(1, min(config.save_every, -(-steps // CHECKPOINTS))))]
            self.trainer.start(f"{stem_of(chosen)}-{time.strftime('%Y%m%d-%H%M%S')}", [folder], flags)
        except VlmLoraError as error:
            raise plain(short(str(error), self.place)) from None
        return Markup("<p>It has begun.</p>")

    def _folder(self, chosen: str) -> Path:
        if not chosen:
            raise DataError("Choose pictures first")
        return self.albums.roots.folder(chosen)

    # -- while it learns -----------------------------------------------------------------------------------------

    def stop(self) -> None:
        try:
            self.trainer.stop()
        except ConfigError as error:
            raise plain(str(error)) from None

    def resume(self) -> None:
        state = self.trainer.state()
        try:
            run = self.place / (state.name if state else "")
            self.trainer.resume(started_in(run))
        except VlmLoraError as error:
            raise plain(short(str(error), self.place)) from None

    def tell(self, seen: str, drawn: str, adapter: str) -> list:
        """How far the run is, for a page that has ``seen`` and ``drawn`` what was then."""
        state = self.trainer.state()
        if state is None:
            return [gr.skip()] * len(self.outputs)
        now = f"{state.kind} {state.name} {state.step} {state.said}"
        part = f"{state.kind == 'done'} {state.name} {state.step // max(1, state.steps // 40)}"
        if (now, part) == (seen, drawn):
            return [gr.skip()] * len(self.outputs)
        runs, choice = self.desk.runs, gr.skip()
        if state.kind == "done":
            runs.setdefault(state.name, self.place / state.name)
            names = [(name, name) for name in runs]
            none = [] if self.desk.speaker.chosen else [("none: the base alone", "")]
            value = state.name if seen.startswith(f"learning {state.name} ") else adapter
            choice = gr.Dropdown([*none, *names], value=value, visible=True)
        return [
            now,
            part,
            _told(state, self.desk.evaluations),
            self._drawn(state) if part != drawn else gr.skip(),
            gr.Button(visible=state.kind == "learning"),
            gr.Button(visible=state.kind in ("stopped", "failed")),
            choice,
            gr.Timer(OFTEN if state.kind == "learning" else SELDOM),
        ]

    def _drawn(self, state: State) -> Markup:
        from vlm_lora import show_learning  # here, as it brings torch

        run = self.place / state.name
        return show_learning(run, pictures_of(run) if (run / "config.yaml").is_file() else {})


# -- words -------------------------------------------------------------------------------------------------------


def _told(state: State, evaluations: Evaluations) -> Markup:
    """The run in a line that is read from afar, and one below it."""
    share = state.step / state.steps if state.steps else 0
    heads = {"learning": "Learning", "done": "Learned", "stopped": "Stopped", "failed": "It could not go on"}
    big = heads[state.kind]
    if state.kind == "learning":
        big = f"Step {state.step:,} of {state.steps:,}" if state.step else "Getting ready"
        big = "Comparing with the base" if state.steps and state.step == state.steps else big
    small = state.said
    if state.kind == "done":
        evaluation = evaluations.of(state.name)
        verdict = evaluation.verdict() if evaluation else ["Nothing was held out to compare it with the base."]
        small = " ".join([*verdict, "It is among the adapters above: ask it on the Picture tab."])
    elif state.kind == "stopped":
        small = f"After step {state.step:,}, and saved: Resume goes on from there, and so does --resume."
    return progress(state.kind, state.name, big, 1.0 if state.kind == "done" else share, small)


def _in_words(facts: dict, wrong: str, album: Album | None) -> Markup:
    """What `check` found, as a person would say it; ``album``: where captions are corrected on the page."""
    without = sum(text == "" for text in album.captions(album.pictures).values()) if album else 0
    lines = []
    if facts:
        kind = "captions" if album else "answers"
        head = Markup('<span class="lead">{:,} pictures, {:,} {}.</span>')
        lines.append(head.format(facts["images"], facts["answers"], kind))
    if wrong and not without:
        lines.append(escape(wrong))
    if without:
        lines.append(Markup("{:,} have no caption: write one, or they are left out.").format(without))
    bad = [row for row in facts.get("bad", ()) if not (without and "caption" in row["reason"])]
    for row in bad[:5]:
        lines.append(Markup("{}: {}.").format(Path(row["source"]).name, row["reason"]))
    if len(bad) > 5:
        lines.append(Markup("And {:,} more that cannot be used.").format(len(bad) - 5))
    told = {
        "duplicates": "{:,} pictures are there more than once.",
        "near_duplicates": "{:,} pairs of pictures look alike.",
    }
    lines += [Markup(text).format(facts[key]["count"]) for key, text in told.items() if facts and facts[key]["count"]]
    lines += (
        [Markup("Said most often: “{}”, {:,} times.").format(*facts["repeated"][0])] if facts.get("repeated") else []
    )
    if facts and not bad and not without:
        lines.append(Markup("All of them can be used."))
    if not album:
        lines.append(Markup("What this data says is corrected in its files: it is not captions beside pictures."))
    return Markup("").join(Markup("<p>{}</p>").format(line) for line in lines)


def _noticed(facts: dict) -> dict[str, str]:
    """Pictures that `check` names as there twice or alike, and what to say of them."""
    noticed: dict[str, str] = {}
    for key, what in (("duplicates", "the same as"), ("near_duplicates", "looks like")):
        for names in facts.get(key, {}).get("first", ()):
            for name in names:
                noticed.setdefault(name, f"{what} {next((each for each in names if each != name), name)}")
    return noticed


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{max(1, round(seconds))} seconds"
    return f"{minutes} minutes" if minutes < 90 else f"{seconds / 3600:.1f} hours"
