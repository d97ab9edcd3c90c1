"""From a config to examples in tokens: read, split, encode. What training, `vlm-lora plan` and the page share."""

import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from vlm_lora.config import TrainConfig
from vlm_lora.data.example import Example, ImageRef
from vlm_lora.data.readers import BadRow, Dataset, DataSettings, bad_rows, read_dataset
from vlm_lora.data.split import split_examples, without_held_out
from vlm_lora.errors import DataError
from vlm_lora.model.encode import EncodedExample, Encoder
from vlm_lora.model.features import FeatureCache
from vlm_lora.training.events import Events
from vlm_lora.training.processes import Processes


@dataclass(frozen=True, slots=True)
class SplitData:
    """What was read: examples to learn from, held-out ones, and the rows that cannot be used."""

    train: list[Example]
    held_out: list[Example]
    bad_rows: tuple[BadRow, ...]
    taken_for: str
    fingerprint: str
    val_fingerprint: str | None

    @property
    def systems(self) -> list[str]:
        """The system prompts of what is said about images, "" where there is none; each once, the commonest first."""
        with_images = [example for example in self.train if example.images]
        found = Counter(dialogue.system for example in with_images for dialogue in example.dialogues)
        return [system for system, _ in found.most_common()]


@dataclass(frozen=True, slots=True)
class Prepared:
    """The examples in tokens, those whose texts are too long or whose images cannot be used left out as bad rows."""

    train: list[EncodedExample]
    held_out: list[EncodedExample]
    bad_rows: tuple[BadRow, ...]

    @property
    def weighted(self) -> list[EncodedExample]:
        """What an epoch learns from: each example as often as its weight says."""
        return [each for each in self.train for _ in range(each.example.weight)]


def read_data(config: TrainConfig, sources: Sequence[str]) -> Dataset:
    return read_dataset(sources, DataSettings(**config.reading))


def read_and_split(config: TrainConfig) -> SplitData:
    """Raises DataError where data cannot be read, or nothing in it can be used."""
    dataset = read_data(config, config.sources)
    held_dataset = read_data(config, (config.val,)).part("val", "test") if config.val else None
    if held_dataset and config.val:
        dataset = without_held_out(dataset, held_dataset, config.val)
    elif dataset.val or dataset.test:
        dataset = without_held_out(dataset, dataset.part("val", "test"), "the rows marked val or test")
        held_dataset = replace(dataset.part("val"), bad=()) if dataset.val else None
    bad = dataset.bad + (held_dataset.bad if held_dataset else ())
    if not dataset.examples:
        raise no_usable_example(config, bad, len(dataset.val) + len(dataset.test))
    if not any(example.images for example in dataset.examples):
        raise DataError(
            f"{', '.join(config.sources)}: no row names an image. Say --columns image=NAME; rows of text alone are "
            "learnt beside rows with images, as in vlm-lora train PHOTOS TEXTS"
        )
    train, held_out = list(dataset.examples), list(held_dataset.examples) if held_dataset else []
    if not held_dataset and config.val_split:
        train, held_out = split_examples(train, config.val_split, config.seed)
    taken_for = ". ".join(dataset.parts) or dataset.taken_for
    val_fingerprint = held_dataset.fingerprint() if held_dataset else None
    return SplitData(train, held_out, bad, taken_for, dataset.fingerprint(), val_fingerprint)


def encode(
    config: TrainConfig,
    data: SplitData,
    encoder: Encoder,
    grid: Callable[[ImageRef], torch.Tensor],
    progress: Callable[[int, int], None],
) -> Prepared:
    """Every dialogue in tokens; of the images the headers alone are looked at.

    Args:
        grid: the image's ``grid_thw`` ``(3,)``; raises DataError where its header cannot be read.
        progress: called with the number of examples that are in tokens, and of all.
    """
    bad = list(data.bad_rows)

    def encoded(examples: Sequence[Example]) -> list[EncodedExample]:
        result = []
        for done, example in enumerate(examples, start=1):
            progress(done, len(examples))
            try:
                grids = [grid(image) for image in example.images]
            except DataError as error:
                bad.extend(bad_rows(example, str(error)))
                continue
            grid_thw = torch.stack(grids) if grids else torch.zeros(0, 3, dtype=torch.long)
            fitting, too_long = encoder.encode_fitting(example, grid_thw, config.max_tokens)
            result += [fitting] if fitting else []
            bad.extend(too_long)
        return result

    return Prepared(encoded(data.train), encoded(data.held_out), tuple(bad))


def sees_each_image_once(config: TrainConfig, examples: Sequence[Example]) -> bool:
    """Whether the run ends before any image comes again, so that keeping features would be in vain."""
    answers = sum(len(example.dialogues) for example in examples)
    once = config.epochs <= 1 or (config.max_steps is not None and config.max_steps * config.batch_size <= answers)
    return once and all(example.weight == 1 for example in examples)


def see_images(
    prepared: Prepared, features: FeatureCache, processes: Processes, seen_once: bool, events: Events
) -> Prepared:
    """Have every image's features in the cache, if they are to be there; examples with a damaged image are left out.

    Held-out images are seen again and again, at every save, and so come first; training images, if ``seen_once``, are
    not kept.
    """

    def usable(examples: Sequence[EncodedExample], keep: bool) -> tuple[list[EncodedExample], list[BadRow]]:
        features.write, bad = keep, []
        result = []
        at_once = 32 * processes.count if processes.count > 1 else 1
        for start in range(0, len(examples), at_once):
            some = examples[start : start + at_once]
            # The tower's work is shared out; what is wrong with an image goes to every process.
            own = [_what_is_wrong(features, each.example) for each in some[processes.index :: processes.count]]
            shares = processes.gather(own)
            for i, each in enumerate(some):
                if error := shares[i % processes.count][i // processes.count]:
                    bad.extend(bad_rows(each.example, error))
                else:
                    result.append(each)
            events.cache(start + len(some), len(examples))
        return result, bad

    kept = (prepared.held_out,) if seen_once else (prepared.held_out, prepared.train)
    _survey(features, kept, processes, events)
    held_out, bad_held_out = usable(prepared.held_out, True)
    if seen_once:
        features.write = False
        events.survey(features.survey(_images(prepared.train), evict=False), features.folder, True)
    train, bad = usable(prepared.train, not seen_once)
    features.write = not seen_once
    return Prepared(train, held_out, (*prepared.bad_rows, *bad, *bad_held_out))


def _images(examples: Sequence[EncodedExample]) -> list[ImageRef]:
    return [image for each in examples for image in each.example.images]


def _survey(
    features: FeatureCache, kept: Sequence[Sequence[EncodedExample]], processes: Processes, events: Events
) -> None:
    """Make room in the cache for these, the first group before the next: one process of each machine does."""
    images, first = [_images(examples) for examples in kept], processes.accelerator.is_local_main_process
    features.write = True
    if first:
        survey = features.survey(*images)
    processes.gather(None)
    if not first:
        survey = features.survey(*images, evict=False)
    if survey.images:
        events.survey(survey, features.folder, False)


def _what_is_wrong(features: FeatureCache, example: Example) -> str:
    """Make its images ready; what is wrong with one of them, or ""."""
    try:
        for image in example.images:
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
