"""From a config to lessons: read, split, count tokens. What training, `vlm-lora plan` and the page share."""

import os
import shlex
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain, islice

from vlm_lora.config import LOOKED_AT_FIRST, TrainConfig
from vlm_lora.data.example import Example, ImageRef
from vlm_lora.data.examples import Examples
from vlm_lora.data.index import Looks, key_of, locked
from vlm_lora.data.readers import BadRow, Dataset, DataSettings, bad_rows, read_dataset
from vlm_lora.data.split import split_examples, without_held_out
from vlm_lora.errors import DataError
from vlm_lora.model.encode import AT_ONCE, Encoder, Sizes
from vlm_lora.model.features import FeatureCache
from vlm_lora.training.events import Events
from vlm_lora.training.lessons import Grids, KeptSizes, Lessons, as_tensor
from vlm_lora.training.processes import Processes


@dataclass(frozen=True, slots=True)
class SplitData:
    """What was read: examples to learn from, held-out ones, and the rows that cannot be used."""

    train: Sequence[Example]
    held_out: Sequence[Example]
    bad_rows: tuple[BadRow, ...]
    taken_for: str
    fingerprint: str
    val_fingerprint: str | None
    looks: Looks = field(default_factory=Looks)
    """What is known of the images by now."""

    @property
    def systems(self) -> list[str]:
        """The system prompts of what is said about images, "" where there is none; each once, the commonest first."""
        examples = Examples.of(self.train)
        if examples.columns.system is not None:  # no need to look at each
            return [examples.columns.system] if any(examples.images) else []
        with_images = [example for example in examples if example.images]
        found = Counter(dialogue.system for example in with_images for dialogue in example.dialogues)
        return [system for system, _ in found.most_common()]


@dataclass(frozen=True, slots=True)
class Prepared:
    """The examples and their numbers of tokens, those whose texts are too long or whose images cannot be used left out
    as bad rows."""

    train: Lessons
    held_out: Lessons
    bad_rows: tuple[BadRow, ...]

    @property
    def weighted(self) -> Lessons:
        """What an epoch learns from: each example as often as its weight says."""
        return self.train.weighted

    @property
    def images(self) -> Iterator[ImageRef]:
        return chain(self.train.images, self.held_out.images)


def read_data(config: TrainConfig, sources: Sequence[str], warn: Callable[[str], None] = lambda text: None) -> Dataset:
    return read_dataset(sources, DataSettings(**config.reading), keep=config.cache, warn=warn)


def index_name(config: TrainConfig) -> object:
    """What an index of its data goes by; None where nothing is to be kept on disk."""
    return (*map(os.path.realpath, config.sources), config.val) if config.cache else None


def read_and_split(
    config: TrainConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
    warn: Callable[[str], None] = lambda text: None,
) -> SplitData:
    """Raises DataError where data cannot be read, or nothing in it can be used.

    Args:
        progress: called with the number of images that were looked at, and of those that the index does not have.
        warn: called with a sentence where the index cannot be kept.
    """
    looks = Looks(index_name(config), warn)
    dataset = read_data(config, config.sources, warn)
    held_dataset = read_data(config, (config.val,), warn).part("val", "test") if config.val else None
    sides = (dataset.examples, dataset.val, dataset.test, held_dataset.examples if held_dataset else ())
    looks.look_at_all(chain.from_iterable(images for side in sides for images in Examples.of(side).images), progress)
    if held_dataset and config.val:
        dataset = without_held_out(dataset, held_dataset, config.val, looks.sha256)
    elif dataset.val or dataset.test:
        marked = dataset.part("val", "test")
        dataset = without_held_out(dataset, marked, "the rows marked val or test", looks.sha256)
        held_dataset = replace(dataset.part("val"), bad=()) if dataset.val else None
    bad = dataset.bad + (held_dataset.bad if held_dataset else ())
    if not dataset.examples:
        raise no_usable_example(config, bad, len(dataset.val) + len(dataset.test))
    if not any(Examples.of(dataset.examples).images):
        raise DataError(
            f"{', '.join(config.sources)}: no row names an image. Say --columns image=NAME; rows of text alone are "
            "learnt beside rows with images, as in vlm-lora train PHOTOS TEXTS"
        )
    train, held_out = dataset.examples, held_dataset.examples if held_dataset else Examples.of(())
    if not held_dataset and config.val_split:
        train, held_out = split_examples(train, config.val_split, config.seed, looks.sha256)
    taken_for = ". ".join(dataset.parts) or dataset.taken_for
    val_fingerprint = held_dataset.fingerprint() if held_dataset else None
    return SplitData(train, held_out, bad, taken_for, dataset.fingerprint(), val_fingerprint, looks)


def count_tokens(
    config: TrainConfig,
    data: SplitData,
    encoder: Encoder,
    progress: Callable[[int, int], None],
) -> Prepared:
    """Count every dialogue's tokens, but of those that the index has; of the images the sizes alone matter.

    Args:
        progress: called with the number of examples whose tokens are counted, and of all.
    """
    bad, name, grid = list(data.bad_rows), index_name(config), lru_cache(4096)(encoder.backbone.grid)
    kept = KeptSizes(f"tokens-{key_of(name, encoder.fingerprint).hex()}" if name else None)

    def counted(examples: Examples, fewer: dict[int, Example]) -> Iterator[tuple[int, Sizes]]:
        images = enumerate(examples.images)
        while some := list(islice(images, AT_ONCE)):
            grids: dict[int, Grids] = {}
            for place, refs in some:
                try:
                    grids[place] = [grid(*data.looks.size(image)) for image in refs]
                except DataError as error:
                    bad.extend(bad_rows(examples[place], str(error)))
            for place, sizes in zip(grids, kept.sizes(encoder, examples, grids), strict=True):
                if sizes.longest_sequence <= config.max_tokens:
                    yield place, sizes
                    continue
                given = examples[place], as_tensor(grids[place]), config.max_tokens, sizes
                fitting, sizes, too_long = encoder.fitting(*given)
                bad.extend(too_long)
                if fitting:
                    fewer[place] = fitting
                    yield place, sizes
            progress(some[-1][0] + 1, len(examples))

    def lessons(examples: Sequence[Example]) -> Lessons:
        packed, fewer = Examples.of(examples), {}
        return Lessons.of(packed, counted(packed, fewer), fewer)

    with locked(kept.table.path):  # the other processes find what the first one counts
        kept.table.load()
        train, held_out = lessons(data.train), lessons(data.held_out)
        try:
            kept.save()
        except OSError as error:
            data.looks.warn(f"how many tokens the texts have is not kept for later runs: {error}")
    return Prepared(train, held_out, tuple(bad))


def sees_each_image_once(config: TrainConfig, examples: Sequence[Example]) -> bool:
    """Whether the run ends before any image comes again, so that keeping features would be in vain."""
    examples = Examples.of(examples)
    answers = int(examples.num_answers.sum())
    once = config.epochs <= 1 or (config.max_steps is not None and config.max_steps * config.batch_size <= answers)
    return once and all(weight == 1 for weight in examples.weights)


def takes_images_as_they_come(config: TrainConfig, prepared: Prepared) -> bool:
    """Whether the steps begin before all images were looked at. It must not depend on what is known of them already:
    a run that is resumed has to take the same steps."""
    many = len(prepared.train) + len(prepared.held_out) > LOOKED_AT_FIRST
    return config.validate_first == "no" or (config.validate_first == "auto" and many)


def make_room(
    prepared: Prepared, features: FeatureCache, processes: Processes, seen_once: bool, events: Events
) -> None:
    """Have the cache take the features of images as they come: of all, or if ``seen_once``, of held-out ones alone."""
    if seen_once:
        features.write = False
        events.survey(features.survey(prepared.train.images, evict=False), features.folder, True)
        features.keep_only(prepared.held_out.images)
    _survey(features, (prepared.held_out,) if seen_once else (prepared.held_out, prepared.train), processes, events)


def see_images(
    prepared: Prepared, features: FeatureCache, processes: Processes, seen_once: bool, events: Events
) -> Prepared:
    """Have every image's features in the cache, if they are to be there; examples with a damaged image are left out.

    Held-out images are seen again and again, at every save, and so come first; training images, if ``seen_once``, are
    not kept.
    """

    def usable(examples: Lessons, keep: bool) -> tuple[Lessons, list[BadRow]]:
        features.write, bad = keep, []
        kept = array("q")
        at_once = 32 * processes.count if processes.count > 1 else 1
        images, learnt, done = iter(examples.learnt_from.images), examples.learnt_from, 0
        while some := list(islice(images, at_once)):
            # The tower's work is shared out; what is wrong with an image goes to every process.
            own = [_what_is_wrong(features, refs) for refs in some[processes.index :: processes.count]]
            shares = processes.gather(own)
            for i in range(len(some)):
                if error := shares[i % processes.count][i // processes.count]:
                    bad.extend(bad_rows(learnt[done + i], error))
                else:
                    kept.append(done + i)
            done += len(some)
            events.cache(done, len(examples))
        return examples.take(kept), bad

    kept = (prepared.held_out,) if seen_once else (prepared.held_out, prepared.train)
    _survey(features, kept, processes, events)
    held_out, bad_held_out = usable(prepared.held_out, True)
    if seen_once:
        features.write = False
        events.survey(features.survey(prepared.train.images, evict=False), features.folder, True)
    train, bad = usable(prepared.train, not seen_once)
    features.write = not seen_once
    features.keep_looks()
    return Prepared(train, held_out, (*prepared.bad_rows, *bad, *bad_held_out))


def _survey(features: FeatureCache, kept: Sequence[Lessons], processes: Processes, events: Events) -> None:
    """Make room in the cache for these, the first group before the next: one process of each machine does."""
    first = processes.accelerator.is_local_main_process
    features.write = True
    if first:
        survey = features.survey(*(examples.images for examples in kept))
    processes.gather(None)
    if not first:
        survey = features.survey(*(examples.images for examples in kept), evict=False)
    if survey.images:
        events.survey(survey, features.folder, False)


def _what_is_wrong(features: FeatureCache, images: Sequence[ImageRef]) -> str:
    """Make them ready; what is wrong with one of them, or ""."""
    try:
        for image in images:
            features.prepare(image)
    except DataError as error:
        return str(error)
    return ""


def require_usable(config: TrainConfig, bad: Sequence[BadRow]) -> None:
    """Raises DataError if there are bad rows and the run is to stop for them."""
    if bad and config.on_bad_row == "stop":
        check = ["vlm-lora", "check", *config.sources, "--model", config.model, *config.row_flags]
        raise DataError(
            f"{', '.join(config.sources)}: {len(bad)} rows cannot be used, and nothing was trained. {_listed(bad)} "
            f"Mend them ({shlex.join(check)} lists all), or leave them out with --on-bad-row quarantine "
            "(they are listed in the run folder)."
        )


def no_usable_example(config: TrainConfig, bad: Sequence[BadRow], marked: int = 0) -> DataError:
    """The error to raise; ``marked`` is how many examples are not to be trained on."""
    why = f"{marked:,} examples are marked val or test. " if marked else ""
    return DataError(f"{', '.join(config.sources)}: no usable example in it. {why}{_listed(bad)}".rstrip())


def _listed(bad: Sequence[BadRow]) -> str:
    rows = [f"{row.place}: {row.reason}." for row in bad[:5]]
    return " ".join(rows) + (f" And {len(bad) - 5} more." if len(bad) > 5 else "")
