"""The tab on which a person trains: pictures in, captions corrected, what it costs, Train; and how it goes.

The training is the command, as a process of its own, that goes on without the page and the demo. What is known of it
is in its run folder and, beside that, in ``NAME.train.json`` (which process it is) and ``NAME.train.log`` (what it
says), so that a demo that is started later finds it. A run that was begun on the command line can be resumed here, and
the other way round.
"""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import psutil
from markupsafe import Markup

from vlm_lora import TrainConfig, VlmLoraError, show_learning
from vlm_lora.console import duration
from vlm_lora.demo.captions import ALL, LONGEST, NOTICED, WITHOUT, Sheet, chooser
from vlm_lora.demo.folders import METADATA, Album, Roots, short, stem_of
from vlm_lora.demo.runs import Evaluations, config_of
from vlm_lora.demo.tabs import IN_ORDER, QUIETLY, Desk, empty, progress
from vlm_lora.errors import ConfigError, DataError

CHECKPOINTS = 6
"""Of a run from the page, so that there is something to watch."""
OFTEN, SELDOM = 2, 10
"""Seconds between two looks at the run, while it learns and while it does not."""
EMPTY = empty("Nothing has been trained here yet.", "Choose pictures, look at their captions, and press Train.")
COMMAND = (sys.executable, "-P", "-m", "vlm_lora")
RECORD, LOG = ".train.json", ".train.log"
ASKED_SECONDS = 600
"""`check` and `plan` may take so long."""


class Training:
    """Pictures in, an adapter out. ``tell`` gives a value for each of ``outputs``."""

    def __init__(self, app: gr.Blocks, desk: Desk, roots: Roots):
        self.desk, self.roots, self.trainer = desk, roots, Trainer(roots.uploads.parent)
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

        for event in chosen:
            event(self.look_at, folder, [found, work, cost, *self.sheet.outputs], api_visibility="private")
        count.click(self.cost, [folder, epochs, rate], cost, api_visibility="private")
        began = train.click(self.train, [folder, epochs, rate], cost, show_progress="minimal", api_visibility="private")
        changed = began, stop.click(self.trainer.stop, **IN_ORDER), resume.click(self.trainer.resume, **IN_ORDER)
        seen, drawn, timer = gr.Textbox("", visible="hidden"), gr.Textbox("", visible="hidden"), gr.Timer(SELDOM)
        self.outputs = [seen, drawn, state, learning, stop, resume, desk.adapter, timer]
        for event in (app.load, timer.tick, *(each.then for each in changed)):
            event(self.tell, [seen, drawn, desk.adapter], self.outputs, queue=False, **QUIETLY)

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
        state = self.trainer.state()
        now = state and f"{state.kind} {state.name} {state.step} {state.said}"
        part = state and f"{state.kind == 'done'} {state.name} {state.step // max(1, state.steps // 40)}"
        if state is None or (now, part) == (seen, drawn):
            return [gr.skip()] * len(self.outputs)
        run, learns, choice = self.trainer.place / state.name, state.kind == "learning", gr.skip()
        if state.kind == "done":
            self.desk.speaker.runs.setdefault(state.name, run)
            value = state.name if seen.startswith(f"learning {state.name} ") else adapter
            choice = gr.Dropdown(self.desk.speaker.choices(), value=value, visible=True)
        curve = show_learning(run, self.desk.evaluations.pictures(run)) if part != drawn else gr.skip()
        shown = _told(state, self.desk.evaluations), curve
        buttons = gr.Button(visible=learns), gr.Button(visible=state.kind in ("stopped", "failed"))
        return [now, part, *shown, *buttons, choice, gr.Timer(OFTEN if learns else SELDOM)]


# -- the process -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class State:
    """Where the run stands: ``kind`` is learning, done, stopped or failed; ``said`` a sentence of what it does, or why
    it ended."""

    name: str
    kind: str
    step: int = 0
    steps: int = 0
    said: str = ""


def ask(*arguments: str) -> dict:
    """What a command prints with --json. Raises DataError with what it says where it fails."""
    how: dict[str, Any] = {"capture_output": True, "encoding": "utf-8", "errors": "replace", "timeout": ASKED_SECONDS}
    try:
        done = subprocess.run([*COMMAND, *arguments, "--json"], stdin=subprocess.DEVNULL, **how)
        return json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise DataError(f"This takes more than {ASKED_SECONDS // 60} minutes; ask on the command line") from None
    except ValueError:
        raise DataError(_last_words(done.stderr) or "the command ended without a word") from None


class Trainer:
    """One run at a time, in ``place``, where the demo's runs are."""

    def __init__(self, place: Path):
        self.place, self.starting = place, threading.Lock()
        self.child: subprocess.Popen | None = None

    def state(self) -> State | None:
        """That of the newest run that is not done by a page, or of the one a page began last; None: there is none."""
        name, process = self._newest()
        if name is None:
            return None
        run, log = self.place / name, _end_of(self.place / (name + LOG))
        taken = re.findall(r'^\{"step": (\d+), "loss"', _end_of(run / "metrics.jsonl"), re.MULTILINE)
        total = re.findall(r"^([\d,]+) steps over ", log, re.MULTILINE)
        step, steps = (int(found[-1].replace(",", "")) if found else 0 for found in (taken, total))
        if process:
            # What it does where that is no step, "Images prepared: 3 of 40"; of a step, how long the rest takes
            counted = re.search(r"^([A-Z][\w ]+: [\d,]+ of [\d,]+).*\s*\Z", log, re.MULTILINE)
            left = re.findall(r"^step .* answers/s\s+(\S.*) left$", log, re.MULTILINE)
            said = counted[1] if counted else "".join(f"about {text} left" for text in left[-1:] if text != "0 s")
            return State(name, "learning", step, steps, said)
        if (run / "adapter" / "adapter_config.json").is_file():
            return State(name, "done", step, steps)
        said = _last_words(log)
        return State(name, "stopped" if not said or "--resume" in said else "failed", step, steps, said)

    def start(self, name: str, arguments: Sequence[str], folder: Path | None = None) -> None:
        """Begin a run, or with --resume go on with it, from ``folder``. Raises ConfigError while another one learns."""
        with self.starting:
            newest, process = self._newest()
            if process:
                raise ConfigError(f"{newest} is being trained; one run at a time")
            self.place.mkdir(parents=True, exist_ok=True)
            command = [*COMMAND, "train", *arguments, "--output", str(self.place / name)]
            cwd = folder if folder and folder.is_dir() else None
            with (self.place / (name + LOG)).open("wb") as log:  # Ctrl-C is for the demo: a session of its own
                self.child = subprocess.Popen(
                    command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            began = psutil.Process(self.child.pid).create_time()
            record = {"pid": self.child.pid, "began": began, "at": time.time()}
            (self.place / (name + RECORD)).write_text(json.dumps(record), encoding="utf-8")

    def resume(self) -> None:
        """Go on with the run that is not done, from where it was begun. Raises ConfigError where there is none."""
        state = self.state()
        if state is None or state.kind in ("done", "learning"):
            raise ConfigError("There is no run to go on with")
        run = self.place / state.name
        if not (run / "config.yaml").is_file():
            raise ConfigError(f"{state.name} ended before its first step; train anew")
        self.start(state.name, ["--config", str(run / "config.yaml"), "--resume"], config_of(run)[1])

    def stop(self) -> None:
        """Have it finish its step, save and end; a second time, end at once. Raises ConfigError where none learns."""
        _, process = self._newest()
        if process is None:
            raise ConfigError("Nothing is being trained")
        process.terminate()

    def _newest(self) -> tuple[str | None, psutil.Process | None]:
        """The run that a page began last, or one of the command line's that is newer and not done; and the process that
        is at work on it, where a page began it. Another process may have got its number since."""
        begun = {path: path.name.removesuffix(RECORD) for path in self.place.glob("*" + RECORD)}
        for path in self.place.glob("*/config.yaml"):
            if not (path.parent / "adapter").exists():
                begun[path] = path.parent.name
        name = begun.get(max(begun, key=lambda path: path.stat().st_mtime, default=Path()))
        if self.child and self.child.poll() is not None:
            self.child = None
        try:
            record = json.loads((self.place / f"{name}{RECORD}").read_text(encoding="utf-8"))
            process = psutil.Process(int(record["pid"]))
            alive = process.create_time() == record["began"] and process.status() != psutil.STATUS_ZOMBIE
        except (OSError, ValueError, KeyError, TypeError, psutil.Error):
            alive = False
        return name, process if alive else None


def _end_of(path: Path, most: int = 1 << 20) -> str:
    """What a log ends with; nothing where there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - most))
        return file.read().decode("utf-8", "replace")


def _last_words(said: str) -> str:
    """What the command ended with, without its name."""
    words = re.findall(r"^vlm-lora: (.*)$", said, re.MULTILINE)
    return words[-1] if words else ""


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
        saved = f"After step {state.step:,}, and saved: Resume goes on from there, and so does --resume."
        small = saved if state.step else "Before its first step, so that nothing is saved: train anew."
    return progress(state.kind, state.name, big, share, small)


def _in_words(facts: dict, wrong: str, album: Album | None) -> Markup:
    """What `check` found, as a person would say it; ``album``: where captions are corrected on the page."""
    without = sum(text == "" for text in album.captions(album.pictures).values()) if album else 0
    bad = [row for row in facts.get("bad", ()) if not (without and re.search("caption|this image", row["reason"]))]
    twice, alike = (facts.get(key, {}).get("count", 0) for key in ("duplicates", "near_duplicates"))
    kind, often = "captions" if album else "answers", (facts.get("repeated") or [()])[0]
    told = [
        (facts, '<span class="lead">{:,} pictures, {:,} {}.</span>', facts.get("images"), facts.get("answers"), kind),
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
