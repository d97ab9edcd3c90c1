"""The training that the page starts: the command, as a process of its own, that goes on without the page and the demo.

What is known of it is in its run folder and, beside that, in ``NAME.train.json`` (which process it is) and
``NAME.train.log`` (what it says), so that a demo that is started later finds it. A run that was begun on the command
line can be resumed here, and the other way round.
"""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from vlm_lora.demo.runs import config_of
from vlm_lora.errors import ConfigError, DataError

COMMAND = (sys.executable, "-P", "-m", "vlm_lora")
RECORD, LOG = ".train.json", ".train.log"
ASKED_SECONDS = 600
"""`check` and `plan` may take so long."""


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
        self.place = place
        self.starting = threading.Lock()
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
            return State(name, "learning", step, steps, _doing(log))
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


def _doing(log: str) -> str:
    """What it does now, where that is no step: "Images prepared: 3 of 40"; of a step, how long the rest takes."""
    counted = re.search(r"^([A-Z][\w ]+: [\d,]+ of [\d,]+).*\s*\Z", log, re.MULTILINE)
    left = re.findall(r"^step .* answers/s\s+(\S.*) left$", log, re.MULTILINE)
    return counted[1] if counted else f"about {left[-1]} left" if left and left[-1] != "0 s" else ""


def _last_words(said: str) -> str:
    """What the command ended with, without its name."""
    words = re.findall(r"^vlm-lora: (.*)$", said, re.MULTILINE)
    return words[-1] if words else ""
