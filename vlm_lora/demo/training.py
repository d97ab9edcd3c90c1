"""The tab on which a person trains: pictures in, captions corrected, what it costs, Train; and how it goes."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from vlm_lora import TrainConfig, VlmLoraError
from vlm_lora.console import duration
from vlm_lora.demo.album import METADATA, Album
from vlm_lora.demo.inputs import Roots, short, stem_of
from vlm_lora.demo.runs import Evaluations
from vlm_lora.demo.sheet import ALL, LONGEST, NOTICED, WITHOUT, Sheet, chooser
from vlm_lora.demo.tabs import AT_ONCE, QUIETLY, Desk, choices, empty, progress
from vlm_lora.demo.trainer import State, Trainer, ask
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
    """Pictures in, an adapter out. ``tell`` gives a value for each of ``outputs``."""

    def __init__(self, app: gr.Blocks, desk: Desk, roots: Roots, place: Path):
        self.desk, self.roots, self.trainer, self.place = desk, roots, Trainer(place), place
        with gr.Row():
            with gr.Column(min_width=300):
                folder, chosen = chooser(app, roots, "Pictures and their texts, or a zip", "data")
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
        self.sheet = Sheet(desk, roots, (ALL, NOTICED, WITHOUT, LONGEST))

        private: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 1}
        for event in chosen:
            event(self.look_at, folder, [found, work, cost, *self.sheet.outputs], **private)
        count.click(self.cost, [folder, epochs, rate], cost, **private)
        train.click(self.train, [folder, epochs, rate], cost, show_progress="minimal", **private)
        stop.click(self.trainer.stop, **AT_ONCE)
        resume.click(self.trainer.resume, **AT_ONCE)
        seen, drawn, timer = gr.Textbox("", visible="hidden"), gr.Textbox("", visible="hidden"), gr.Timer(SELDOM)
        self.outputs = [seen, drawn, state, learning, stop, resume, desk.adapter, timer]
        told = [app.load, timer.tick, train.click, resume.click, stop.click]
        gr.on(told, self.tell, [seen, drawn, desk.adapter], self.outputs, queue=False, **QUIETLY)

    # -- before --------------------------------------------------------------------------------------------------

    def look_at(self, name: str | None, request: gr.Request) -> Iterator[list]:
        """What `check` finds, in words, and the captions."""
        pages: list = [gr.skip()] * len(self.sheet.outputs)
        yield [Markup("<p>Looking at the pictures …</p>"), gr.skip(), gr.skip(), *pages]
        self.sheet.flush()
        facts, wrong, album, folder = {}, "", None, self.roots.folder(name)
        rows, pages[0] = (folder / METADATA).is_file(), gr.Column(visible=False)
        try:
            facts = ask("check", str(folder))
        except DataError as error:
            wrong = str(error)
        try:
            album = self.roots.album(str(name), rows, anew=True)
            written = any(album.captions(album.pictures).values())
            if facts and not (written and facts["format"] == ("imagefolder" if rows else "sidecar")):
                album = None  # what is said is elsewhere
            else:
                pages = self.sheet.open(str(name), rows, request.session_hash, _noticed(facts))
        except VlmLoraError as error:
            album, wrong = None, str(error)
        yield [_in_words(facts, short(wrong, folder), album), gr.Column(visible=True), Markup(""), *pages]

    def _command(self, name: str, epochs: Any, rate: Any) -> tuple[TrainConfig, list[str]]:
        """The run, and what the command is to be told of it."""
        self.sheet.flush()
        model, folder = self.desk.speaker.first.result().backbone.name, str(self.roots.folder(name))
        try:
            config = TrainConfig(data=folder, model=model, epochs=float(epochs), lr=float(rate))
        except (TypeError, ValueError):
            raise ConfigError("--epochs and --lr: expected numbers") from None
        return config, [folder, "--model", model, "--epochs", f"{config.epochs:g}", "--lr", f"{config.lr:g}"]

    def cost(self, name: str, epochs: Any, rate: Any) -> Markup:
        """What `plan` says: time and memory."""
        plan = ask("plan", *self._command(name, epochs, rate)[1])
        seconds = plan["step_seconds"] + plan["tower_seconds"] + plan["held_out_seconds"]
        memory, room = plan["memory"] / 1e9, plan["device_memory"] / 1e9
        return Markup('<p class="lead">About {}</p><p>{:,} steps; {:.1f} GB of {:.1f} GB of memory. {}</p>').format(
            duration(seconds), plan["cost"]["steps"], memory, room, " ".join(plan["advice"])
        )

    def train(self, name: str, epochs: Any, rate: Any) -> Markup:
        """Begin it: the command, in a process of its own."""
        config, command = self._command(name, epochs, rate)
        answers = ask("check", command[0])["answers"] * (1 - config.val_split) * config.epochs
        every = -(-int(answers / config.batch_size) // CHECKPOINTS)
        command += ["--save-every", str(max(1, min(config.save_every, every)))]
        self.trainer.start(f"{stem_of(name)}-{time.strftime('%Y%m%d-%H%M%S')}", command)
        return Markup("<p>It has begun.</p>")

    # -- while it learns -----------------------------------------------------------------------------------------

    def tell(self, seen: str, drawn: str, adapter: str) -> list:
        """How far the run is, for a page that has ``seen`` and ``drawn`` what was then."""
        from vlm_lora import show_learning  # here, as it brings torch

        state = self.trainer.state()
        now = state and f"{state.kind} {state.name} {state.step} {state.said}"
        part = state and f"{state.kind == 'done'} {state.name} {state.step // max(1, state.steps // 40)}"
        if state is None or (now, part) == (seen, drawn):
            return [gr.skip()] * len(self.outputs)
        runs, run, choice, learns = self.desk.speaker.runs, self.place / state.name, gr.skip(), state.kind == "learning"
        if state.kind == "done":
            runs.setdefault(state.name, run)
            value = state.name if seen.startswith(f"learning {state.name} ") else adapter
            choice = gr.Dropdown(choices(runs, self.desk.speaker.chosen), value=value, visible=True)
        curve = show_learning(run, self.desk.evaluations.pictures(run)) if part != drawn else gr.skip()
        shown = _told(state, self.desk.evaluations), curve
        buttons = gr.Button(visible=learns), gr.Button(visible=state.kind in ("stopped", "failed"))
        return [now, part, *shown, *buttons, choice, gr.Timer(OFTEN if learns else SELDOM)]


# -- words -------------------------------------------------------------------------------------------------------


def _told(state: State, evaluations: Evaluations) -> Markup:
    """The run in a line that is read from afar, and one below it."""
    heads = {"done": "Learned", "stopped": "Stopped", "failed": "It could not go on"}
    big, small, share = heads.get(state.kind, "Getting ready"), state.said, state.step / max(1, state.steps)
    if state.kind == "learning" and state.step:
        comparing = state.step == state.steps
        big = "Comparing with the base" if comparing else f"Step {state.step:,} of {state.steps:,}"
    elif state.kind == "done":
        evaluation, share = evaluations.of(state.name), 1.0
        verdict = evaluation.verdict() if evaluation else ["Nothing was held out to compare it with the base."]
        small = " ".join([*verdict, "It is among the adapters above: ask it on the Picture tab."])
    elif state.kind == "stopped":
        small = f"After step {state.step:,}, and saved: Resume goes on from there, and so does --resume."
    return progress(state.kind, state.name, big, share, small)


def _in_words(facts: dict, wrong: str, album: Album | None) -> Markup:
    """What `check` found, as a person would say it; ``album``: where captions are corrected on the page."""
    without = sum(text == "" for text in album.captions(album.pictures).values()) if album else 0
    bad = [row for row in facts.get("bad", ()) if not (without and "caption" in row["reason"])]
    twice, alike = (facts.get(key, {}).get("count", 0) for key in ("duplicates", "near_duplicates"))
    kind, often = "captions" if album else "answers", (facts.get("repeated") or [()])[0]
    counts = facts.get("images"), facts.get("answers")
    told = [
        (facts, '<span class="lead">{:,} pictures, {:,} {}.</span>', *counts, kind),
        (wrong and not without, "{}", wrong),
        (without, "{:,} have no caption: write one, or they are left out.", without),
        *((True, "{}: {}.", Path(row["source"]).name, row["reason"]) for row in bad[:5]),
        (len(bad) > 5, "And {:,} more that cannot be used.", len(bad) - 5),
        (twice, "{:,} pictures are there more than once.", twice),
        (alike, "{:,} pairs of pictures look alike.", alike),
        (often, "Said most often: “{}”, {:,} times.", *often),
        (facts and not bad and not without, "All of them can be used."),
        (not album, "What this data says is corrected in its files: it is not captions beside pictures."),
    ]
    return Markup("").join(Markup(f"<p>{text}</p>").format(*values) for holds, text, *values in told if holds)


def _noticed(facts: dict) -> dict[str, str]:
    """Pictures that `check` names as there twice or alike, and what to say of them."""
    noticed: dict[str, str] = {}
    for key, what in (("duplicates", "the same as"), ("near_duplicates", "looks like")):
        for names in facts.get(key, {}).get("first", ()):
            for name in names:
                noticed.setdefault(name, f"{what} {next((each for each in names if each != name), name)}")
    return noticed
