"""`read_dataset`: from paths to what each holds, to its rows, to Examples and bad rows."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from vlm_lora.config import DEFAULT_PROMPT, parse_columns
from vlm_lora.data.archives import is_archive, unpacked
from vlm_lora.data.example import Example
from vlm_lora.data.examples import Examples, with_ids
from vlm_lora.data.fetch import fetch_image
from vlm_lora.data.locate import Find, Finder, folders_beside
from vlm_lora.data.origin import depend_on
from vlm_lora.data.readers import coco, folders, hub
from vlm_lora.data.readers.boxes import AS_IS, TYPES, BoxReader
from vlm_lora.data.readers.detect import FORMATS, READERS, Layout, detect
from vlm_lora.data.readers.fields import Ledger, require_plain
from vlm_lora.data.readers.gather import BadRow, Dataset, Entry, Rows, gather
from vlm_lora.data.readers.kept import kept_dataset
from vlm_lora.data.readers.rows import NAMES, SHAPES, RowReader
from vlm_lora.errors import ConfigError, DataError

MAX_WEIGHT = 1000
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSettings:
    """How data is read. The fields have the names that they have in `TrainConfig`."""

    prompt: str = DEFAULT_PROMPT
    """The instruction that a caption answers; it may hold variables, such as ``{tags}``."""
    format: str | None = None
    """The format, such as "sidecar", "coco" or "messages"; None: it is detected."""
    columns: str | Mapping[str, str] | None = None
    """Names of your columns: ``{"image": "NAME", "caption": "NAME"}``, or as text "image=NAME,caption=NAME"."""
    images: str | Path | None = None
    """A folder to search for images that are not beside the data."""
    allow_outside: bool = False
    """Allow images outside of the data's folder (``..``, absolute names, links)."""
    allow_urls: bool = False
    """Download images that are given as http:// or https:// addresses, one after the other."""
    ignore_columns: str | Sequence[str] = ()
    """Fields to read rows without; as text, separated by commas."""
    text_as_is: bool = False
    """Read marks of other tools in texts (``<video>``, ``<|image_1|>``) as plain letters."""
    system: str | None = None
    """The system prompt of rows without one."""
    train_on: str = "all"
    """Which answers of a conversation are learnt: "last" or "all"."""
    json_boxes: str = AS_IS
    """The unit of the numbers of ``bbox_2d`` and ``point_2d`` in texts: "real" (pixels), "norm1" (shares of the image),
    "norm1000" (thousandths); "as-is" leaves them as they are."""

    @property
    def column_names(self) -> dict[str, str]:
        """`columns` as a dictionary.

        Raises:
            ConfigError: the text is not "image=NAME,caption=NAME".
        """
        return dict(self.columns) if isinstance(self.columns, Mapping) else parse_columns(self.columns)

    def ledger(self) -> Ledger:
        """A new account of the fields that nothing uses."""
        names = self.ignore_columns.split(",") if isinstance(self.ignore_columns, str) else self.ignore_columns
        return Ledger(frozenset(name.strip() for name in names))


def read_dataset(
    data: str | Path | Sequence[str | Path],
    settings: DataSettings | None = None,
    *,
    keep: bool = False,
    warn: Callable[[str], None] = lambda text: None,
    progress: Callable[[int], None] = lambda rows: None,
    **fields: Any,
) -> Dataset:  # arguments: of the rows, of the disk, of who waits
    """Read a folder, a file or a data set of the hub, and detect its format. No image is decoded.

    A row that cannot be used raises nothing: it is listed in the result's ``bad``.

    Args:
        data: a path, or a hub name (``hf:owner/name``, ``hf-stream:owner/name:train[:1000]``), or several of these. An
            epoch learns each answer of ``photos:2`` twice; weights are whole numbers.
        settings: how rows are read. Its fields can also be given by name: ``prompt="Describe this."``.
        keep: have the cache folder keep what was read, until a file of the data, or a folder's content, changes: a
            later call then reads no row. Not so of the hub and of images from the web.
        warn: called with a sentence where it cannot be kept.
        progress: called with the number of rows read so far of a source; not where none is read.

    Raises:
        DataError: nothing is there, or it can be read in no way or in two.
        ConfigError: an unknown format or column, a weight that is no whole number, or a source given twice.
    """
    settings = replace(settings or DataSettings(), **fields)
    for key, name in settings.column_names.items():
        if key not in NAMES:
            raise ConfigError(f"--columns {key}={name}: unknown {key!r}; expected one of {', '.join(NAMES)}")
    if settings.format is not None and settings.format not in FORMATS:
        raise ConfigError(f"--format {settings.format}: unknown; expected one of {', '.join(FORMATS)}")
    if settings.json_boxes not in (AS_IS, *TYPES):
        expected = ", ".join((AS_IS, *TYPES))
        raise ConfigError(f"--json-boxes {settings.json_boxes}: unknown; expected one of {expected}")
    if settings.images is not None and not Path(settings.images).is_dir():
        raise ConfigError(f"--images {settings.images}: there is no such folder; check the name")
    sources = [_weighed(source) for source in ([data] if isinstance(data, str | Path) else data)]
    places = [os.path.realpath(place) for place, _ in sources]
    if twice := [place for number, (place, _) in enumerate(sources) if places[number] in places[:number]]:
        raise ConfigError(f"{twice[0]!r} is given twice; to learn from it twice an epoch, say {twice[0]}:2")

    def read() -> Dataset:
        parts = [(place, weight, _read(place, settings, progress)) for place, weight in sources]
        return parts[0][2] if len(parts) == 1 and parts[0][1] == 1 else _joined(parts)

    if not keep or settings.allow_urls or any(hub.is_hub_name(place) or hub.is_saved(place) for place, _ in sources):
        return read()
    images = settings.images and os.path.realpath(settings.images)
    return kept_dataset((sources, places, images, settings, settings.column_names), read, warn)


def _weighed(source: str | Path) -> tuple[str, int]:
    """`photos:2` as ("photos", 2); what is there under the whole name has no weight."""
    place, colon, weight = str(source).rpartition(":")
    if not colon or not re.fullmatch(r"-?[\d.]+", weight) or os.path.lexists(source):
        return str(source), 1
    if not weight.isdecimal() or not 1 <= int(weight) <= MAX_WEIGHT:
        raise ConfigError(
            f"{str(source)!r}: the weight is how often each answer is seen in an epoch, a whole number from 1 to "
            f"{MAX_WEIGHT}; found {weight}"
        )
    return place, int(weight)


def _joined(sources: Iterable[tuple[str, int, Dataset]]) -> Dataset:
    """Several data sets as one; of each: its name, its weight, its data.

    An image that two of them have stays an example of each.
    """
    train, val, test, bad, parts, formats, unused = [], [], [], [], [], [], Counter()
    for place, weight, dataset in sources:
        named = below(place, dataset)
        train.append(_times(weight, named.examples))
        val.append(named.val)
        test.append(named.test)
        bad += named.bad
        unused.update(named.unused)
        formats.append(dataset.format)
        answers = int(Examples.of(dataset.examples).num_answers.sum())
        times = f", each {weight} times an epoch" if weight > 1 else ""
        parts.append(f"{place}: {len(dataset.examples):,} examples, {answers:,} answers{times}; {dataset.taken_for}")
    examples, val, test = (with_ids(chain.from_iterable(side)) for side in (train, val, test))
    format = " + ".join(dict.fromkeys(formats))
    return Dataset(format, examples, tuple(bad), val, test, unused=dict(unused), parts=tuple(parts))


def _times(weight: int, examples: Iterable[Example]) -> Iterator[Example]:
    return (replace(example, weight=weight * example.weight) for example in examples)


def below(place: str, dataset: Dataset) -> Dataset:
    """The data set of `place`, with its folder in front of the names of images and files: so those of several differ.

    The names of a hub's rows begin with its own already.
    """
    if hub.is_hub_name(place):
        return dataset
    folder = Path(place) if Path(place).is_dir() or is_archive(Path(place)) else Path(place).parent
    before = f"{folder.as_posix()}/"

    def moved(e: Example) -> Example:
        images = tuple(replace(ref, name=before + ref.name) for ref in e.images)
        dialogues = tuple(replace(d, source=before + d.source) for d in e.dialogues)
        return replace(e, id=before + e.id, images=images, dialogues=dialogues, source=before + e.source)

    bad = tuple(replace(row, source=before + row.source) for row in dataset.bad)
    train, val, test = (Examples.of(map(moved, side)) for side in (dataset.examples, dataset.val, dataset.test))
    return replace(dataset, examples=train, val=val, test=test, bad=bad)


def _read(place: str, settings: DataSettings, progress: Callable[[int], None]) -> Dataset:
    """One source. Raises DataError as `read_dataset` does."""
    if settings.format in (None, "hub") and hub.is_hub_name(place):
        find = partial(hub.find_in_row, fetch=fetch_image if settings.allow_urls else None)
        return _read_tables("hub", [hub.read_hub(place)], find, settings, progress)
    path = Path(place)
    try:
        if not path.exists():
            raise DataError(f"{place!r}: there is no such folder or file; check the name")
        path = path.resolve()
        depend_on(path)
        if not path.is_dir() and not path.is_file():
            expected = ", ".join(READERS)
            raise DataError(f"{path.name}: is not a regular file; expected a folder or one of {expected}")
        found = unpacked(path) if is_archive(path) else path
        layout = detect(found, settings.format)
        dataset = _read_layout(layout, settings, progress)
        held = [(part, _read_layout(each, settings, progress)) for part, each in layout.held]
        unpacked_into = f"unpacked into {found}" if found != path else ""
        return replace(_with_held(dataset, held), unread="; ".join(filter(None, (unpacked_into, layout.unread))))
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}; check its permissions"
        raise DataError(f"{error.filename or path.name}: {reason}") from error


def _with_held(dataset: Dataset, held: Sequence[tuple[str, Dataset]]) -> Dataset:
    """The data set with what lies in folders of its other parts; what a row of these says of its part holds for it."""
    if not held:
        return dataset
    bad, unused = [*dataset.bad], Counter(dataset.unused)
    for _, other in held:
        bad += other.bad
        unused.update(other.unused)

    def marked(wanted: str) -> Iterator[Example]:
        yield from getattr(dataset, wanted)
        for part, other in held:
            for example in chain(other.examples, other.val, other.test):
                dialogues = tuple(replace(dialogue, split=dialogue.split or part) for dialogue in example.dialogues)
                if wanted == ("test" if dialogues[0].split == "test" else "val"):
                    yield replace(example, dialogues=dialogues)

    val, test = (with_ids(marked(part)) for part in ("val", "test"))
    return replace(dataset, bad=tuple(bad), val=val, test=test, unused=dict(unused))


def _read_layout(layout: Layout, settings: DataSettings, progress: Callable[[int], None]) -> Dataset:
    finder, name, ledger = _finder(layout, settings), layout.name_of(layout.files[0]), settings.ledger()
    folder, note, repeats, once = layout.folder or layout.root, "", {}, ""
    if layout.format in ("sidecar", "classes"):
        repeats, once = folders.repeats_of(folder, layout.files)
    if layout.format == "sidecar":
        entries = folders.read_sidecars(layout.files, finder, settings.prompt, folder, layout.twins)
        note = f"{layout.twins.captions.name}/ has the captions of {layout.twins.images.name}/" if layout.twins else ""
    elif layout.format == "classes":
        entries = folders.read_classes(layout.files, finder, settings.prompt, folder, repeats)
        note = f"the name of each image's folder is learnt, as the answer to {settings.prompt!r}"
    elif layout.format == "coco":
        entries = coco.read_coco(layout.content, name, settings.prompt, finder.find, ledger)
    elif layout.format == "vqav2":
        questions, answers = layout.content
        entries = coco.read_vqa(questions, answers, name, finder.find, ledger)
    else:
        dataset = _read_tables(layout.format, layout.tables(), finder.find, settings, progress)
        uncovered = _uncovered(layout, finder) if layout.format == "imagefolder" else ()
        return replace(dataset, bad=(*dataset.bad, *uncovered))
    dataset = gather(layout.format, _settled(_counted(entries, progress), settings))
    if repeats:
        times = ", ".join(f"{place.name}/ {times}" for place, times in list(repeats.items())[:8])
        times += f", and {len(repeats) - 8} more" if len(repeats) > 8 else ""
        note = "; ".join(filter(None, (note, f"times an epoch, as kohya's folders say: {times}")))
        examples = (replace(e, weight=repeats[(layout.root / e.images[0].name).parent]) for e in dataset.examples)
        dataset = replace(dataset, examples=Examples.of(examples))
    note = "; ".join(filter(None, (note, once)))
    return replace(dataset, note=note, unused=dict(ledger.unused))


def _read_tables(
    format: str | None,
    tables: Iterable[tuple[str, Rows]],
    find: Find,
    settings: DataSettings,
    progress: Callable[[int], None],
) -> Dataset:
    """Tables, each with its name for messages, as one data set; `format` None: the shape of its rows."""
    ledger = settings.ledger()
    reader = RowReader(settings.prompt, find, settings.column_names, format if format in SHAPES else None, ledger)
    note = ""

    def entries() -> Iterator[Entry | BadRow]:
        nonlocal note
        for name, rows in tables:
            note = yield from reader.read_all(name, _counted(rows, progress))

    dataset = gather(format or "", _settled(entries(), settings))
    return replace(dataset, format=format or note.partition(":")[0], note=note, unused=dict(ledger.unused))


def _settled(entries: Iterable[Entry | BadRow], settings: DataSettings) -> Iterator[Entry | BadRow]:
    """What holds for dialogues of every format: their system prompt, what of them is learnt, the boxes in their JSON,
    and no foreign marks."""
    boxes, system = BoxReader(settings.json_boxes), (settings.system or "").strip()
    for entry in entries:
        if not isinstance(entry, BadRow):
            images, dialogue = entry
            if system and not dialogue.system:
                dialogue = replace(dialogue, system=system)
            if settings.train_on == "last":
                earlier = tuple(replace(turn, weight=0.0) for turn in dialogue.turns[:-1])
                dialogue = replace(dialogue, turns=(*earlier, dialogue.turns[-1]))
            try:
                entry = images, (dialogue := boxes.with_json(dialogue, images))
                if not settings.text_as_is:
                    require_plain(dialogue)
                if not any(turn.weight for turn in dialogue.turns):
                    raise DataError("has no answer that is learnt: all are marked with no loss; remove the row")
            except DataError as error:
                entry = BadRow(dialogue.source, dialogue.line, str(error))
        yield entry


def _finder(layout: Layout, settings: DataSettings) -> Finder:
    if layout.format in ("sidecar", "classes"):  # each image is known, and so is its place
        return Finder(layout.root, allow_outside=settings.allow_outside)
    file = layout.files[0]
    places = (file.parent,) if layout.format == "imagefolder" else folders_beside(file, layout.root)
    elsewhere = settings.images and Finder(Path(settings.images).resolve(), allow_outside=settings.allow_outside)
    fetch = fetch_image if settings.allow_urls else None
    return Finder(layout.root, places, settings.allow_outside, fetch, elsewhere or None)


def _counted(rows: Iterable[T], progress: Callable[[int], None]) -> Iterator[T]:
    for number, row in enumerate(rows, start=1):
        progress(number)
        yield row


def _uncovered(layout: Layout, finder: Finder) -> Iterator[BadRow]:
    """The images that metadata does not name: the Hugging Face loader drops these without a word."""
    metadata = layout.files[0]
    known = {ref.path for ref in finder.refs.values() if ref}
    for path in folders.images_below(metadata.parent):
        is_named = path.relative_to(metadata.parent).as_posix() in finder.refs
        if not is_named and Path(os.path.realpath(path)) not in known:
            reason = f"no row of {metadata.name} names this image; add one, or remove it"
            yield BadRow(layout.name_of(path), None, reason)
