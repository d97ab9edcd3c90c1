"""What the run folders hold for the page: which there are, and held-out pictures with their answers."""

import io
import json
import logging
import re
import tempfile
from ast import literal_eval
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vlm_lora import DataSettings, Evaluation, Example, ImageRef, VlmLoraError, load_image, read_dataset
from vlm_lora.config import HUB_NAME, TrainConfig, config_from, read_yaml
from vlm_lora.errors import AdapterError, ConfigError, DataError

if TYPE_CHECKING:
    from vlm_lora.inference.scoring import Answered

log = logging.getLogger(__name__)

BROWSER_FORMATS = ("GIF", "JPEG", "PNG", "WEBP")
THUMBNAIL = 512
"""Longest side of a small picture, in pixels."""
KINDS = ("Better", "Worse", "Still wrong", "The same")
"""What can become of an answer."""


def find_runs(adapter: str | Path | None, beside: str | Path = "runs") -> dict[str, Path]:
    """Run folders by name: that of ``adapter`` first, then those beside it (without one: in ``beside``), newest first.

    An adapter folder that is in no run stands for itself.

    Raises:
        AdapterError: ``adapter`` holds none, or is no folder. (What can only be a name of the hub, two words with a
            slash, is looked up when it is loaded.)
    """
    given = Path(adapter).expanduser().resolve() if adapter else None
    held = given and any((given / place / "adapter_config.json").is_file() for place in ("", "adapter"))
    here = given and (given.parent.is_dir() or given.parent == Path(beside).resolve())
    if given and not held and (here or not HUB_NAME.fullmatch(str(adapter))):
        what = "holds no adapter" if given.exists() else "there is no such folder"
        raise AdapterError(f"--adapter {adapter}: {what}. Give a run folder or an adapter folder.")
    if given and given.name == "adapter" and (given.parent / "config.yaml").is_file():
        given = given.parent
    place = given.parent if given else Path(beside).resolve()
    runs = [settings.parent.parent for settings in place.glob("*/adapter/adapter_config.json")]
    runs.sort(key=lambda run: run.stat().st_mtime, reverse=True)
    return {run.name: run for run in ([given] if given else []) + runs}


class Evaluations:
    """Base against tuned as each run ended with it, and its data; read when first asked for."""

    def __init__(self, runs: Mapping[str, Path]):
        self.runs, self.data = runs, cache(data_of)
        self.of = cache(lambda name: self._read(runs[name]) if name in runs else None)

    def _read(self, run: Path) -> Evaluation | None:
        """None where it has none. Without pictures where the data is gone."""
        try:
            return Evaluation.read(run, self.data(run)) if (run / "predictions.jsonl").is_file() else None
        except DataError as error:
            log.warning("%s", error)
            return None

    def pictures(self, run: Path) -> dict[str, ImageRef]:
        """Those that the run may have watched, by the id of their example; none before it has told its settings."""
        return {e.id: e.images[0] for e in self.data(run) if e.images} if (run / "config.yaml").is_file() else {}

    def examples(self, name: str, most: int) -> list["Answered"]:
        """The first answer about each held-out picture, evenly from all that can be shown."""
        evaluation = self.of(name)
        answered = evaluation.answered if evaluation else ()
        rows = list({row.example: row for row in reversed(answered) if len(row.images) == 1}.values())[::-1]
        return rows[:: max(1, len(rows) // most)][:most]

    def places(self, name: str) -> dict[str, list[int]]:
        """Of each kind of change, the answers that have pictures, as places in the evaluation; the most telling first.
        A kind without any is left out."""
        evaluation = self.of(name)
        if evaluation is None or not evaluation.scores.tuned:
            return {}
        changes = evaluation.changes()
        kinds = zip(KINDS, (changes.better, changes.worse, evaluation.still_wrong(), changes.same), strict=True)
        shown = ((kind, [i for i in places if evaluation.answered[i].images]) for kind, places in kinds)
        return {kind: places for kind, places in shown if places}

    def reviewed(self, name: str) -> list[tuple[dict, ImageRef]]:
        """The run's captions and pictures, the most doubtful first, as `eval --review --output RUN` wrote them."""
        if name not in self.runs or not (file := self.runs[name] / "review.jsonl").is_file():
            return []
        images = {image.name: image for e in self.data(self.runs[name]) for image in e.images[:1]}
        try:
            rows = map(json.loads, filter(None, file.read_text(encoding="utf-8").split("\n")))
            rows = [(row, images[row["image"]]) for row in rows if "score" in row and row["image"] in images]
            return sorted(rows, key=lambda each: each[0]["score"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.warning("%s cannot be read: %s", file, error)
            return []


def config_of(run: Path) -> tuple[TrainConfig, Path]:
    """The run's settings, and the folder in which it was started: the recorded one; else, of an earlier release, that
    from which its name for the run leads there; else this process's.

    Raises:
        ConfigError: there are none, or they cannot be read.
    """
    file, here = run / "config.yaml", run.resolve()
    config = config_from(read_yaml(file), str(file))
    recorded = re.match(r"# Started in (['\"].*['\"])\n", file.read_text(encoding="utf-8"))
    starts = [Path(literal_eval(recorded[1]))] if recorded else []
    name = Path(config.output or here)
    starts += [folder for folder in here.parents if not name.is_absolute() and (folder / name).resolve() == here]
    starts += [Path.cwd()]
    given = [*config.sources, *([config.val] if config.val else [])]
    return config, next((folder for folder in starts if any(_is_in(folder, name) for name in given)), starts[0])


def data_of(run: Path) -> list[Example]:
    """The data that the run was given, then its --val, as far as they are still there."""
    examples: list[Example] = []
    try:
        config, start = config_of(run)
        for given in (config.sources, *([(config.val,)] if config.val else [])):
            there = {name: (start / name).as_posix() for name in (*given, config.images or "") if _is_in(start, name)}
            reading: dict[str, Any] = config.reading | {"images": there.get(config.images or "", config.images)}
            try:
                dataset = read_dataset([there.get(name, name) for name in given], DataSettings(**reading))
            except VlmLoraError as error:
                gone = [name for name in given if name not in there and not name.startswith(("hf:", "hf-stream:"))]
                why = f"{gone[0]!r} is not in {start}, where it was started; put it back there" if gone else error
                log.warning("No pictures: the data of %s cannot be read again: %s", run, why)
                continue
            # Of several sources, the training named pictures by the folder that it was given
            own = "" if any(Path(name).is_absolute() for name in given) else f"{start.as_posix()}/"
            found = (*dataset.examples, *dataset.val, *dataset.test)
            examples += [replace(example, id=example.id.removeprefix(own)) for example in found]
    except ConfigError as error:
        log.warning("No pictures: %s", error)
    return examples


def _is_in(folder: Path, name: str) -> bool:
    """Whether a file or folder that config.yaml names is there, perhaps with a weight after it; a hub's name is not."""
    return bool(name) and any((folder / path).exists() for path in (name, name.rpartition(":")[0] or name))


class Pictures:
    """Files that a browser shows, made when first asked for, in a folder that is deleted with the app.

    ``file(image, small)`` is the picture as it is, or a thumbnail; None, and a line in the log, where there is none.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.file = cache(self._file)

    def _file(self, image: ImageRef, small: bool = False) -> Path | None:
        try:
            picture, data = load_image(image), image.read_bytes()
        except DataError as error:
            log.warning("Picture left out: %s", error)
            return None
        # Its bytes stay what they are where possible, so that features kept from the training are found again.
        kind = Image.open(io.BytesIO(data)).format
        if (small and max(picture.size) > THUMBNAIL) or kind not in BROWSER_FORMATS:
            if small:
                picture.thumbnail((THUMBNAIL, THUMBNAIL))
            kind, buffer = "JPEG" if small else "PNG", io.BytesIO()
            picture.save(buffer, kind)
            data = buffer.getvalue()
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=f".{kind.lower()}", delete=False) as file:
            file.write(data)
        return Path(file.name)
