"""The run folder: its name, its lock, and what is written into it while training."""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from filelock import FileLock, Timeout

from vlm_lora.config import TrainConfig, write_yaml
from vlm_lora.data.readers import BadRow
from vlm_lora.errors import CheckpointError
from vlm_lora.model.adapters.base import Adapter
from vlm_lora.training.checkpoint import writing
from vlm_lora.training.processes import Processes

LOCK = ".lock"
QUARANTINE = "quarantined.jsonl"


NAMELESS = re.compile(
    r"train(ing)?|val(idation)?|test|data(set)?|images?|captions?|metadata|annotations?", re.IGNORECASE
)
"""What a file or folder of data is called that tells nothing of the data: its parent's name does."""


def run_stem(config: TrainConfig) -> str:
    """What a run is called after: its first data, or the folder around it where that is called "train" or the like."""
    path = Path(config.sources[0]).resolve()
    names = [_plain(part.name.split(".")[0]) for part in (path, *path.parents)]
    return next((name for name in names if name and not NAMELESS.fullmatch(name)), names[0] or "data")


def _plain(name: str) -> str:
    return re.sub(r"[^\w-]+", "-", name).strip("-")


def new_run_name(config: TrainConfig) -> str:
    return f"runs/{run_stem(config)}-{time.strftime('%Y%m%d-%H%M%S')}"


def newest_unfinished(config: TrainConfig) -> Path:
    """The run that ``--resume`` without ``--output`` means, of those that `new_run_name` has named.

    Raises:
        CheckpointError: there is none.
    """
    before = _plain(Path(config.sources[0]).resolve().name.split(".")[0])  # as earlier releases named it
    name = re.compile(f"({re.escape(run_stem(config))}|{re.escape(before)})" + r"-\d{8}-\d{6}")
    unfinished = [p for p in Path("runs").glob("*") if name.fullmatch(p.name) and not (p / "adapter").exists()]
    if not unfinished:
        raise CheckpointError(
            f"--resume: runs/ holds no unfinished run of {', '.join(config.sources)}. Give its folder with --output."
        )
    return max(unfinished, key=lambda path: path.name[-15:])


@contextmanager
def locked(folder: Path, made: bool = False) -> Iterator[None]:
    """Inside, no other process can enter; the lock of a process that was killed is gone with it.

    A folder that was ``made`` for the run goes again where nothing was written: a run that is refused leaves none.
    """
    try:
        with FileLock(folder / LOCK, timeout=0):
            try:
                yield
            finally:
                if made and folder.is_dir() and [path.name for path in folder.iterdir()] == [LOCK]:
                    (folder / LOCK).unlink()
                    folder.rmdir()
    except Timeout as error:
        raise CheckpointError(
            f"--output {folder}: another process is training into it. Wait for it, or give another folder."
        ) from error


def prepare_folder(folder: Path, resume: bool) -> bool:
    """Make it, before the model is loaded; whether it was not there.

    Raises:
        CheckpointError: a run would be overwritten, or the folder cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"--output {folder}: is a file; a run needs a folder.")
    used = folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())
    if used and not resume:
        raise CheckpointError(
            f"--output {folder}: holds a run already. Resume it with --resume, or give another folder."
        )
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"--output {folder}: cannot be written ({error.strerror}).") from error
    return made


class RunFolder:
    """What a run writes while it trains. Only the main process writes; the others call the same methods.

    Attributes:
        identity: which run this is, for its checkpoints.
    """

    def __init__(self, path: Path, identity: dict, processes: Processes, report_to: str | None = None):
        self.path, self.identity, self.processes, self.report_to = path, identity, processes, report_to
        self._log: TextIO | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def begin(self, config: TrainConfig, first: int, bad_rows: Sequence[BadRow]) -> None:
        """config.yaml, quarantined.jsonl with these rows, and metrics.jsonl as it was after step ``first``."""
        if self.processes.is_main:
            if bad_rows or (self.path / QUARANTINE).exists():
                self._quarantine(bad_rows, "w")
            with writing(self.path):
                write_yaml(config.replace(output=str(self.path)), self.path / "config.yaml")
                self._log = _open_log(self.path / "metrics.jsonl", first)

    def log(self, line: dict) -> None:
        """A line of metrics.jsonl, to the tracker too where there is one."""
        if self._log:
            with writing(self.path / "metrics.jsonl"):
                self._log.write(json.dumps(line) + "\n")
                self._log.flush()
        if self.report_to:
            numbers = {name: value for name, value in line.items() if name not in ("step", "examples", "watched")}
            with writing(self.path / self.report_to):
                self.processes.accelerator.log(numbers, step=line["step"])

    def quarantine(self, bad_rows: Sequence[BadRow]) -> None:
        """Add rows to quarantined.jsonl."""
        if self.processes.is_main:
            self._quarantine(bad_rows, "a")

    def _quarantine(self, bad_rows: Sequence[BadRow], mode: str) -> None:
        rows = [{"source": row.source, "line": row.line, "reason": row.reason} for row in bad_rows]
        path = self.path / QUARANTINE
        # Names that are no UTF-8 as JSON writes them
        with writing(path), path.open(mode, encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def close_log(self) -> None:
        if self._log:
            self._log.close()
            self._log = None

    def append_to_log(self, line: dict) -> None:
        """One more line when the log is closed; not for the tracker."""
        with writing(self.path / "metrics.jsonl"), (self.path / "metrics.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")

    def save_adapter(self, adapter: Adapter) -> None:
        with writing(self.path / "adapter"):
            adapter.save(self.path / "adapter")


def require_room(folder: Path, adapter: Adapter, config: TrainConfig) -> None:
    """Refuse a disk that the checkpoints would fill: each holds the adapter's tensors and twice that of AdamW's."""
    adapter_bytes = sum(parameter.nbytes for _, parameter in adapter.named_parameters())
    needed = adapter_bytes * (3 * (config.keep_checkpoints + 2) + 1)  # with the best, one being written, the adapter
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"--output {folder}: {free / 2**20:,.0f} MiB are free on this disk, the run's checkpoints need "
            f"{needed / 2**20:,.0f} MiB. Make room, keep fewer with --keep-checkpoints, or give another --output."
        )


def _open_log(path: Path, first: int) -> TextIO:
    """Open for writing after step ``first``: lines of what is done again are dropped, those of later steps and of the
    held-out losses and captions after this one."""
    kept = []
    if first and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                read = json.loads(line)
                done_again = any(name.startswith("held_out_loss") or name == "watched" for name in read)
                if read["step"] < first or (read["step"] == first and not done_again):
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a killed run may be cut off
    temporary = path.with_name(f".{path.name}")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)  # at once: a kill in between leaves the old lines
    return path.open("a", encoding="utf-8")
