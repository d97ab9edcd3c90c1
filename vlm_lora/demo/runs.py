"""What the run folders hold for the page: which there are, and held-out pictures with their answers."""

import io
import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vlm_lora import DataSettings, Example, ImageRef, VlmLoraError, load_image, read_dataset
from vlm_lora.config import HUB_NAME, config_from, read_yaml
from vlm_lora.errors import AdapterError, DataError

if TYPE_CHECKING:
    from vlm_lora import Evaluation
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


def place_of_runs(adapter: str | Path | None, beside: str | Path = "runs") -> Path:
    """The folder of the runs that `find_runs` finds, where there are some."""
    runs = find_runs(adapter, beside)
    return next(iter(runs.values())).parent if runs else Path(beside).resolve()


class Evaluations:
    """Base against tuned as each run ended with it, read when first asked for."""

    def __init__(self, runs: Mapping[str, Path]):
        self.runs = runs
        self.data = cache(lambda name: [*data_of(runs[name]), *data_of(runs[name], val=True)])
        self.of = cache(lambda name: _read(runs[name]) if name in runs else None)

    def examples(self, name: str, most: int) -> list["Answered"]:
        """The first answer about each held-out picture, evenly from all that can be shown."""
        evaluation = self.of(name)
        first: dict[str, Answered] = {}
        for row in evaluation.answered if evaluation else ():
            if len(row.images) == 1:
                first.setdefault(row.example, row)
        rows = list(first.values())
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
        run = self.runs.get(name)
        images = {image.name: image for e in self.data(name) for image in e.images[:1]} if run else {}
        return [(row, images[row["image"]]) for row in read_review(run) if row["image"] in images] if run else []


def _read(run: Path) -> "Evaluation | None":
    """What the run's evaluation wrote; None where it has none. Without pictures where the data is gone."""
    from vlm_lora import Evaluation  # here, as it brings torch

    if not (run / "predictions.jsonl").is_file():
        return None
    try:
        return Evaluation.read(run, data_of(run, val=True) or data_of(run))
    except DataError as error:
        log.warning("%s", error)
        return None


def data_of(run: Path, *, val: bool = False) -> list[Example]:
    """The data that the run was given, or its --val; nothing where there is none, or it is gone."""
    try:
        config = config_from(read_yaml(run / "config.yaml"), str(run / "config.yaml"))
        start = _started_in(run, config.output)
        given = config.sources if not val else [config.val] if config.val else []
        sources = [_seen_from(start, source) for source in given]
        reading: dict[str, Any] = config.reading
        reading["images"] = config.images and _seen_from(start, config.images)
        if not sources:
            return []
        dataset = read_dataset(sources, DataSettings(**reading))
        examples = (*dataset.examples, *dataset.val, *dataset.test)
        return [replace(example, id=example.id.removeprefix(f"{start.as_posix()}/")) for example in examples]
    except VlmLoraError as error:
        log.warning("No pictures: the data of %s cannot be read again (%s)", run, error)
        return []


@cache
def pictures_of(run: Path) -> dict[str, ImageRef]:
    """Those that a run may have watched, by the id of their example."""
    return {e.id: e.images[0] for e in [*data_of(run), *data_of(run, val=True)] if e.images}


def read_review(run: Path) -> list[dict]:
    """Rows of the run's review.jsonl that have a score, the lowest first; none where there is no such file."""
    try:
        lines = (run / "review.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return sorted((row for row in rows if "score" in row), key=lambda row: row["score"])
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("%s cannot be read: %s", run / "review.jsonl", error)
        return []


def started_in(run: Path) -> Path:
    """The folder in which the training was started that wrote the run's config.yaml."""
    return _started_in(run, config_from(read_yaml(run / "config.yaml"), "config.yaml").output)


def _started_in(run: Path, output: str | None) -> Path:
    """The folder in which the training was started; this process's where ``output``, its name for the run, does not
    tell."""
    run, name = run.resolve(), Path(output or run.resolve())
    above = () if name.is_absolute() else run.parents
    return next((folder for folder in above if (folder / name).resolve() == run), Path.cwd())


def _seen_from(start: Path, name: str) -> str:
    """A file that config.yaml names, perhaps with a weight after it; what is not there stays as it is: a hub's name."""
    there = any((start / path).exists() for path in (name, name.rpartition(":")[0] or name))
    return (start / name).as_posix() if there else name


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
