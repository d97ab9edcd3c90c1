"""The tab on which a person trains: pictures in, captions corrected, what it costs, Train; and how it goes."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup, escape

from vlm_lora import DataSettings, ImageRef, TrainConfig, Turn, VlmLoraError, read_dataset
from vlm_lora.config import DEFAULT_PROMPT
from vlm_lora.demo.inputs import SafeFiles, plain
from vlm_lora.demo.runs import Evaluations, pictures_of, started_in
from vlm_lora.demo.tabs import AT_ONCE, QUIETLY, STILL, Desk, captions_table
from vlm_lora.demo.trainer import State, Trainer, ask
from vlm_lora.demo.uploads import MOST_FILES, PICTURES, Roots, stem_of, take_in
from vlm_lora.errors import ConfigError, DataError

ROWS = 500
"""Captions in the table. Those of larger data are corrected in their files."""
CHECKPOINTS = 6
"""Of a run from the page, so that there is something to watch."""
SHOWN = 24
"""Pictures, those first that `check` names."""
OFTEN, SELDOM = 2, 10
"""Seconds between two looks at the run, while it learns and while it does not."""
EMPTY = Markup(
    '<div class="empty"><p class="big">Nothing has been trained here yet.</p>'
    "<p>Choose pictures, look at their captions, and press Train. Then this shows how the model learns them.</p>"
    "</div>"
)


@dataclass
class Chosen:
    """The data that a page has chosen: a folder, and its pictures and captions by name, where they can be edited."""

    folder: Path
    name: str
    images: dict[str, ImageRef] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)
    editable: bool = True

    @classmethod
    def of(cls, folder: Path, name: str) -> "Chosen":
        """What is said of each picture below the folder, "" where nothing is; questions, conversations and boxes are
        not edited here."""
        chosen = cls(folder, name)
        try:
            examples = read_dataset([str(folder)], DataSettings()).examples
        except VlmLoraError:
            examples = ()  # `check` says what is wrong
        for example in examples:
            turns = [turn for dialogue in example.dialogues for turn in dialogue.turns]
            said = example.dialogues[0]
            plain_turn = Turn(DEFAULT_PROMPT, said.turns[0].assistant)
            simple = len(example.images) == len(turns) == example.weight == 1 and turns[0] == plain_turn
            if not simple or said.has_marks or said.system or said.split:  # written anew, these would be lost
                chosen.editable = False
                return chosen
            image = example.images[0]
            chosen.images[image.name], chosen.captions[image.name] = image, turns[0].assistant
        known = {image.path for image in chosen.images.values()}
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in PICTURES and path not in known and path.resolve().is_relative_to(folder):
                name = path.relative_to(folder).as_posix()
                chosen.images[name], chosen.captions[name] = ImageRef(path=path, name=name), ""
        chosen.editable = len(chosen.images) <= ROWS
        return chosen

    def corrected(self, table: Sequence[Sequence[Any]]) -> dict[str, str]:
        """The captions as the table has them; none for pictures whose rows are gone or empty.

        Raises DataError for a row of no picture, or two of one.
        """
        captions: dict[str, str] = {}
        for name, text in ((str(row[0] or ""), str(row[1] or "").strip()) for row in table):
            if (name not in self.images or name in captions) and (name or text):
                raise DataError(f"The row of {name or text!r} belongs to no picture, or to one that has a row already")
            if text:
                captions[name] = text
        return captions

    def data(self, table: Sequence[Sequence[Any]], place: Path) -> list[str]:
        """What to give to a command: the folder, or where captions were corrected, a file of them and the folder."""
        if not self.editable:
            return [str(self.folder)]
        captions = self.corrected(table)
        if not captions:
            raise DataError("There are no captions yet. Write what the model shall say beside each picture")
        if captions == self.captions:
            return [str(self.folder)]
        place.mkdir(parents=True, exist_ok=True)
        names = {name: self.images[name].path.relative_to(self.folder).as_posix() for name in captions}
        rows = [json.dumps({"image": names[name], "caption": text}) + "\n" for name, text in captions.items()]
        (place / "captions.jsonl").write_text("".join(rows), encoding="utf-8")
        return [str(place / "captions.jsonl"), "--images", str(self.folder)]


class Training:
    """``show(adapter)`` gives, as every tab's does, a value for each of ``outputs``."""

    def __init__(self, app: gr.Blocks, desk: Desk, roots: Roots, place: Path):
        self.desk, self.roots, self.trainer, self.place = desk, roots, Trainer(place), place
        names = roots.names()
        chosen, seen, drawn = gr.State(None), gr.Textbox("", visible="hidden"), gr.Textbox("", visible="hidden")
        with gr.Row():
            with gr.Column(min_width=300):
                folder = gr.Dropdown(
                    names, value=None, label="A folder of this machine", allow_custom_value=True, visible=bool(names)
                )
                files = SafeFiles(
                    label="Pictures and their texts, or a zip",
                    file_count="multiple",
                    height=140,
                    elem_id="data",
                )
                files.most = MOST_FILES
                look = gr.Button("Look at the pictures", variant="primary")
                found = gr.HTML(Markup(""), elem_id="found")
            with gr.Column(min_width=300, scale=2):
                state = gr.HTML(EMPTY, elem_id="run")
                with gr.Row():
                    stop = gr.Button("Stop", visible=False, min_width=80)
                    resume = gr.Button("Resume", variant="primary", visible=False, min_width=80)
        with gr.Column(visible=False) as work:
            gallery = gr.Gallery(label="Pictures", height=360, elem_id="shown", **STILL)
            table = captions_table("Picture", max_height=360, elem_id="captions")
            with gr.Row():
                epochs = gr.Slider(1, 100, TrainConfig(data="").epochs, step=1, label="Times through the pictures")
                rate = gr.Number(TrainConfig(data="").lr, label="Learning rate")
            with gr.Row():
                count = gr.Button("What will it cost?")
                train = gr.Button("Train", variant="primary")
            cost = gr.HTML(Markup(""), elem_id="cost")
        learning = gr.HTML(Markup(""), elem_id="learning")

        work_of = {"inputs": [chosen, table, epochs, rate], "api_visibility": "private", "concurrency_limit": 1}
        private: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 1}
        shown = [chosen, found, gallery, work, table, cost]
        look.click(self.look_at, [folder, files], shown, **private)
        count.click(self.cost, outputs=cost, **work_of)
        train.click(self.train, outputs=cost, show_progress="minimal", **work_of)
        stop.click(self.stop, **AT_ONCE)
        resume.click(self.resume, **AT_ONCE)
        timer = gr.Timer(SELDOM)
        self.outputs = [seen, drawn, state, learning, stop, resume, desk.adapter, timer]
        told = [app.load, timer.tick, train.click, resume.click, stop.click]
        gr.on(told, self.tell, [seen, drawn, desk.adapter], self.outputs, queue=False, **QUIETLY)

    # -- before --------------------------------------------------------------------------------------------------

    def look_at(self, name: str | None, files: list[ImageRef]) -> Iterator[tuple]:
        """What `check` finds, in words, and the captions."""
        try:
            yield None, Markup("<p>Looking at the pictures …</p>"), *[gr.skip()] * 4
            if files:
                name = stem_of(files[0].name)
                chosen = Chosen.of(take_in(files, self.place / "uploads" / _dated(name)), name)
            elif name:
                chosen = Chosen.of(self.roots.folder(name), stem_of(name))
            else:
                raise DataError("Choose a folder, or drop some pictures first")
            facts, wrong = {}, ""
            try:
                facts = ask("check", str(chosen.folder))
            except DataError as error:
                wrong = _short(str(error), chosen.folder)
        except VlmLoraError as error:
            raise plain(_short(str(error), self.place)) from None
        rows = [[name, text] for name, text in chosen.captions.items()] if chosen.editable else []
        shown = [(str(file), told) for image, told in _shown(facts, chosen) if (file := self._small(image))]
        yield (
            chosen,
            _in_words(facts, wrong, chosen),
            shown,
            gr.Column(visible=True),
            gr.Dataframe(rows, visible=chosen.editable),
            Markup(""),
        )

    def _small(self, image: ImageRef) -> Path | None:
        return self.desk.pictures.file(image, small=True)

    def _flags(self, epochs: Any, rate: Any) -> list[str]:
        model = self.desk.speaker.first.result().backbone.name
        try:
            TrainConfig(data="", epochs=float(epochs), lr=float(rate))
        except (TypeError, ValueError):
            raise ConfigError("--epochs and --lr: expected numbers") from None
        return ["--model", model, "--epochs", f"{float(epochs):g}", "--lr", f"{float(rate):g}"]

    def cost(self, chosen: Chosen | None, table: list[list], epochs: Any, rate: Any) -> Markup:
        """What `plan` says: time and memory."""
        if chosen is None:
            raise plain("Choose pictures first.")
        try:
            plan = ask("plan", *chosen.data(table, self._new_place(chosen)), *self._flags(epochs, rate))
        except VlmLoraError as error:
            raise plain(_short(str(error), self.place)) from None
        seconds = plan["step_seconds"] + plan["tower_seconds"] + plan["held_out_seconds"]
        memory, room = plan["memory"] / 1e9, plan["device_memory"] / 1e9
        return Markup('<p class="lead">About {}</p><p>{:,} steps; {:.1f} GB of {:.1f} GB of memory. {}</p>').format(
            _duration(seconds), plan["cost"]["steps"], memory, room, " ".join(plan["advice"])
        )

    def train(self, chosen: Chosen | None, table: list[list], epochs: Any, rate: Any) -> Markup:
        """Begin it: the command, in a process of its own."""
        if chosen is None:
            raise plain("Choose pictures first.")
        try:
            flags = self._flags(epochs, rate)
            data = chosen.data(table, self._new_place(chosen))
            config = TrainConfig(data=str(chosen.folder), epochs=float(epochs))
            answers = len(chosen.corrected(table)) if chosen.editable else ask("check", str(chosen.folder))["answers"]
            steps = max(1, int(answers * (1 - config.val_split) * config.epochs / config.batch_size))
            flags += ["--save-every", str(max(1, min(config.save_every, -(-steps // CHECKPOINTS))))]
            self.trainer.start(_dated(chosen.name), data, flags)
        except VlmLoraError as error:
            raise plain(_short(str(error), self.place)) from None
        return Markup("<p>It has begun.</p>")

    def _new_place(self, chosen: Chosen) -> Path:
        return self.place / "uploads" / f"{_dated(chosen.name)}-corrected"

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
            raise plain(_short(str(error), self.place)) from None

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
    return Markup(
        '<div class="run {}"><p class="name">{}</p><p class="big">{}</p><div class="bar" role="progressbar" '
        'aria-label="Steps" aria-valuenow="{:.0f}" aria-valuemin="0" aria-valuemax="100">'
        '<div style="width: {:.1f}%"></div></div><p>{}</p></div>'
    ).format(state.kind, state.name, big, 100 * share, 100 * (1.0 if state.kind == "done" else share), small)


def _in_words(facts: dict, wrong: str, chosen: Chosen) -> Markup:
    """What `check` found, as a person would say it."""
    without = sum(not text for text in chosen.captions.values()) if chosen.editable else 0
    lines = []
    if facts:
        kind = "captions" if chosen.editable else "answers"
        head = Markup('<span class="lead">{:,} pictures, {:,} {}.</span>')
        lines.append(head.format(facts["images"], facts["answers"], kind))
    if wrong and without:
        lines.append(Markup('<span class="lead">{:,} pictures.</span>').format(len(chosen.images)))
    elif wrong:
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
    if not chosen.editable:
        lines.append(Markup("Captions of this data are corrected in its files: it has questions, or is large."))
    return Markup("").join(Markup("<p>{}</p>").format(line) for line in lines)


def _shown(facts: dict, chosen: Chosen) -> list[tuple[ImageRef, str]]:
    """The first pictures and their captions; before them those that `check` names as there twice or alike."""
    shown: dict[ImageRef, str] = {}
    for key, what in (("duplicates", "the same as"), ("near_duplicates", "looks like")):
        for names in facts.get(key, {}).get("first", ()):
            for name in names:
                if name in chosen.images:
                    other = next((each for each in names if each != name), name)
                    shown.setdefault(chosen.images[name], f"{what} {other}")
    for name, image in chosen.images.items():
        shown.setdefault(image, chosen.captions[name])
    return list(shown.items())[:SHOWN]


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{max(1, round(seconds))} seconds"
    return f"{minutes} minutes" if minutes < 90 else f"{seconds / 3600:.1f} hours"


def _dated(name: str) -> str:
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _short(text: str, folder: Path) -> str:
    """Without the paths of this machine."""
    for path in (folder, *folder.parents[:-1]):
        text = text.replace(f"{path}/", "").replace(str(path), path.name)
    return text
