"""From a step's answers to micro-batches on the device: dealt out to processes, cut into rows, packed, placed.

What a process computes in a step is a pure function of the step's answers, so every process knows what the others do.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from typing import Any, TypeVar, cast

import torch

from vlm_lora.data.example import Example
from vlm_lora.data.readers import BadRow, bad_rows
from vlm_lora.errors import DataError, ModelError
from vlm_lora.model.backbone import Backbone
from vlm_lora.model.encode import Encoder
from vlm_lora.model.features import FeatureCache, ImageEntry, together
from vlm_lora.model.packing import IGNORE_INDEX, Encoded, Packed, pack_apart, padded_tokens
from vlm_lora.model.preprocess import Pixels
from vlm_lora.model.recurrent import Forks
from vlm_lora.training.lessons import Lesson
from vlm_lora.training.processes import Processes
from vlm_lora.training.techniques import ALL, Techniques

T = TypeVar("T", Packed, ImageEntry)


@dataclass(frozen=True, slots=True)
class Fetched:
    """A micro-batch before it is on the device, its images perhaps still pixels."""

    packed: Packed
    images: list[ImageEntry]
    damaged: tuple[BadRow, ...] = ()
    """Rows of it whose images cannot be used. Their tokens are there, and carry no loss."""
    labels_lost: int = 0
    """Tokens of these that were to carry loss."""

    @property
    def num_labels(self) -> int:
        return int((self.packed.labels[:, 1:] != IGNORE_INDEX).sum())


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of tokens and, in the same order, what `Backbone.forward` takes of their images; ``num_labels`` tokens carry
    loss.

    ``input_ids``, ``labels``, ``weights`` ``(B, T)`` and ``forks`` stay on the CPU, where the code asks about them;
    ``position_ids`` ``(3, B, T)``, ``attention_mask`` and ``images`` are on the device.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    images: torch.Tensor | Pixels | None
    num_labels: int
    forks: Forks
    weights: torch.Tensor | None = None


# ---- who computes what: pure functions of the step's answers ------------------------------------------------------


def padded(rows: Sequence[Lesson]) -> int:
    """Tokens of a micro-batch of these rows, padding included."""
    return padded_tokens([row.prefix for row in rows], [row.num_tokens for row in rows])


def micro_batches(rows: Sequence[Lesson], max_tokens: int) -> list[list[Lesson]]:
    """A process's rows in groups that with padding stay within ``max_tokens``.

    Rows of like length go together, so that little is padded. One image a row and not several: under a mask of several
    images the empty part between them is computed too, which costs more than the padding does. A row that is longer
    by itself is a group of its own; `split_long` keeps those rare.
    """
    groups: list[list[Lesson]] = []
    prefix = after = 0  # the longest of the newest group: each of its rows takes both, as `padded` has it
    for row in sorted(rows, key=lambda row: row.num_tokens, reverse=True):
        together = max(prefix, row.prefix), max(after, row.num_tokens - row.prefix)
        if groups and (len(groups[-1]) + 1) * sum(together) <= max_tokens:
            groups[-1].append(row)
            prefix, after = together
        else:
            groups.append([row])
            prefix, after = row.prefix, row.num_tokens - row.prefix
    return groups


def deal(num_tokens: Sequence[int], num_processes: int) -> list[list[int]]:
    """A step's rows of so many tokens dealt out to processes, as indices of rows: the longest first, each to the one
    that has the fewest tokens so far. A pure function, so every process knows what the others do."""
    shares: list[list[int]] = [[] for _ in range(num_processes)]
    loads = [0] * num_processes
    for i in sorted(range(len(num_tokens)), key=num_tokens.__getitem__, reverse=True):
        least = loads.index(min(loads))
        shares[least].append(i)
        loads[least] += num_tokens[i]
    return shares


def split_long(lesson: Lesson, max_tokens: int) -> list[Lesson]:
    """The example in as many rows as it needs for each to fit in ``max_tokens``: branches are dealt out, never cut."""
    if lesson.num_tokens <= max_tokens:
        return [lesson]
    rows: list[list] = [[]]
    length = lesson.prefix
    for branch in lesson.branches:
        if rows[-1] and length + branch.num_tokens > max_tokens:
            rows.append([])
            length = lesson.prefix
        rows[-1].append(branch)
        length += branch.num_tokens
    return [replace(lesson, branches=tuple(row)) for row in rows]


def share_out(lessons: Sequence[Lesson], max_tokens: int, num_processes: int) -> list[list[Lesson]]:
    """Each process's part of a step, as rows of at most ``max_tokens`` tokens."""
    rows = [row for lesson in lessons for row in split_long(lesson, max_tokens)]
    return [[rows[i] for i in sorted(dealt)] for dealt in deal([row.num_tokens for row in rows], num_processes)]


def imbalance(lessons: Sequence[Lesson], max_tokens: int, num_processes: int) -> float:
    """Tokens of a step's busiest process over the mean of all: the others wait for it."""
    loads = [sum(row.num_tokens for row in share) for share in share_out(lessons, max_tokens, num_processes)]
    return max(loads) * len(loads) / max(1, sum(loads))


def largest_micro_batch(lessons: Sequence[Lesson], max_tokens: int, num_processes: int) -> int:
    """Tokens, padding included, of a step's largest micro-batch in any process."""
    shares = share_out(lessons, max_tokens, num_processes)
    return max(padded(group) for share in shares for group in micro_batches(share, max_tokens))


def count_labels(lessons: Iterable[Lesson]) -> int:
    """Tokens that carry loss, whichever process has them."""
    return sum(lesson.num_labels for lesson in lessons)


# ---- rows to tensors ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loader:
    """Makes this process's micro-batches of a step, from texts and images to tensors."""

    backbone: Backbone
    features: FeatureCache
    processes: Processes
    techniques: Techniques = ALL
    as_they_come: bool = False
    """Whether no image was looked at before the steps, so that a damaged one is found when its turn comes. Else it is
    an error then."""
    damaged: list[BadRow] = field(default_factory=list)
    """Rows that were found so, in any process, and that nobody has taken from here yet."""

    def is_usable(self, lesson: Lesson) -> bool:
        """Whether its images can be had, which is known of those that were looked at before the steps."""
        try:
            return not self.as_they_come or bool(self.features.fetch(lesson.images))
        except DataError:
            return False

    def rows(self, lessons: Sequence[Lesson]) -> list[Lesson]:
        """The lessons as they are dealt out: whole, or in a row for each answer."""
        if self.techniques.shared_prefix:
            return list(lessons)
        return [row for lesson in lessons for row in split_long(lesson, max_tokens=0)]

    def fetch(self, lessons: Sequence[Lesson], max_tokens: int) -> list[Fetched]:
        """This process's share of a step, which alone is tokenised. Needs no model, so it is done ahead, beside the
        step that computes.

        Where the base is sharded, all must make the same number of passes, as its pieces are put together in each: a
        process that has fewer repeats the shortest row, without a label.

        Raises:
            DataError: a text or an image is not the one any more that was counted, or cannot be read; of images not so
                where they are taken `as_they_come`.
        """
        shares = share_out(lessons, max_tokens, self.processes.count)
        groups = micro_batches(shares[self.processes.index], max_tokens)
        fetched = [self._fetch(group) for group in groups]
        if self.processes.sharded:
            most = max(len(micro_batches(share, max_tokens)) for share in shares)
            shortest = min((row for share in shares for row in share), key=lambda row: row.num_tokens)
            for _ in range(most - len(fetched)):
                filler = self._fetch([shortest])
                unlabelled = torch.full_like(filler.packed.labels, IGNORE_INDEX)
                packed = replace(filler.packed, labels=unlabelled)
                fetched.append(replace(filler, packed=packed, damaged=(), labels_lost=0))
        return fetched

    def note_damaged(self, damaged: Sequence[BadRow], labels_lost: int) -> int:
        """Have `damaged` hold what any process has found of the same step; the labels lost in all of them."""
        found = self.processes.gather((damaged, labels_lost))
        self.damaged.extend(row for rows, _ in found for row in rows)
        return sum(lost for _, lost in found)

    def _fetch(self, rows: Sequence[Lesson]) -> Fetched:
        encoded = [row.taken_from(self._encoded(row.example)) for row in rows]
        images: list[ImageEntry] = []
        damaged, labels_lost = [], 0
        for place, row in enumerate(rows):
            try:
                images += self.features.fetch(row.images)
            except DataError as error:
                if not self.as_they_come:
                    raise
                # What was planned stays: the shapes of the pass, and in how many passes the others take part
                images += map(self.features.blank, row.images)
                encoded[place] = encoded[place].unlabelled()
                damaged += bad_rows(row.example, str(error))
                labels_lost += row.num_labels
        packed, device = pack_apart(encoded, self.backbone.pad_token_id), self.backbone.device
        placed = [_pinned(image, device) for image in images]
        return Fetched(_pinned(packed, device), placed, tuple(damaged), labels_lost)

    @cached_property
    def _encoded(self) -> Callable[[Example], Encoded]:
        """The tokens of an example; of the last few they are kept, as one with many answers comes in several rows."""
        encoder = Encoder(self.backbone)
        return lru_cache(maxsize=16)(lambda example: encoder.encode(example.dialogues, self.features.grids(example)))

    def place(self, fetched: Fetched) -> MicroBatch:
        """The micro-batch on the device; images that are still pixels go through the tower first.

        Raises:
            ModelError: the tokens expect other images than were seen.
        """
        packed, device = fetched.packed, self.backbone.device
        images = self.features.compute(fetched.images)
        expected = int((packed.input_ids == self.backbone.image_token_id).sum()) * self.backbone.merge_size**2
        computed = sum(len(image.values) for image in images)
        if expected != computed:
            raise ModelError(f"{expected} patches are expected by the tokens, {computed} were computed.")
        return MicroBatch(
            packed.input_ids,
            packed.labels,
            packed.position_ids.to(device, non_blocking=True),
            packed.attention_mask.to(device, non_blocking=True),
            together(images, device),
            fetched.num_labels,
            packed.forks,
            packed.weights,
        )


def _pinned(tensors: T, device: torch.device) -> T:
    """The dataclass with its tensors where a GPU can fetch them from while it computes: copies from elsewhere wait."""
    if device.type != "cuda":
        return tensors
    members = ((each.name, getattr(tensors, each.name)) for each in fields(tensors))
    pinned: dict[str, Any] = {name: value.pin_memory() for name, value in members if torch.is_tensor(value)}
    if isinstance(tensors, Packed):
        pinned["forks"] = tensors.forks.map(torch.Tensor.pin_memory)
    return cast(T, replace(tensors, **pinned))
