"""What is to be learnt, and of how many tokens: numbers in arrays, and no tokens.

Which answers make up a step, who computes which, and what that costs follow from numbers of tokens alone. So the tokens
themselves are made when a step asks for them, by the process that computes it (`batches.Loader`), and a million images
take some megabytes before that.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import NamedTuple, overload

import numpy as np
import torch

from vlm_lora.data.example import Example, ImageRef
from vlm_lora.data.examples import Examples
from vlm_lora.data.index import Table, index_folder, key_of
from vlm_lora.errors import DataError
from vlm_lora.model.encode import Encoder, Sizes
from vlm_lora.model.packing import Encoded

Grids = Sequence[tuple[int, int, int]]
"""``grid_thw`` of each image of an example."""


class BranchSize(NamedTuple):
    """Of one branch of an `Encoded`, without its tokens."""

    number: int
    """Which one it is."""
    num_tokens: int
    num_labels: int
    num_images: int


@dataclass(frozen=True, slots=True)
class Lesson:
    """An example, or some branches of it, and how many tokens each takes."""

    example: Example
    prefix: int
    """Tokens that its branches share."""
    images_in_prefix: int
    branches: tuple[BranchSize, ...]

    @classmethod
    def of(cls, example: Example, sizes: Sizes) -> "Lesson":
        branches = (BranchSize(number, *size) for number, size in enumerate(sizes.branches))
        return cls(example, sizes.prefix, sizes.images_in_prefix, tuple(branches))

    @property
    def num_tokens(self) -> int:
        return self.prefix + sum(branch.num_tokens for branch in self.branches)

    @property
    def num_labels(self) -> int:
        return sum(branch.num_labels for branch in self.branches)

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """The images in the order of their tokens: those of the prefix, then those of each branch."""
        images, first = self.example.images, self.images_in_prefix
        return images[:first] + tuple(i for b in self.branches for i in images[first : first + b.num_images])

    def with_branches(self, places: Sequence[int]) -> "Lesson":
        """The same with the branches at these places only."""
        return replace(self, branches=tuple(self.branches[i] for i in places))

    def taken_from(self, encoded: Encoded) -> Encoded:
        """The tokens of its branches, from those of its whole example.

        Raises DataError where these are not as many as they were when they were counted.
        """
        branches = tuple(encoded.branches[b.number] for b in self.branches if b.number < len(encoded.branches))
        found = replace(encoded, branches=branches)
        if [len(b.input_ids) for b in branches] != [b.num_tokens for b in self.branches] or self.prefix != len(
            encoded.prefix_ids
        ):
            raise DataError(
                f"{self.example.place}: has {found.num_tokens} tokens, and had {self.num_tokens} when they were "
                "counted: its texts or its image have changed since; put them back, or start again"
            )
        return found


@dataclass(frozen=True)
class Lessons(Sequence[Lesson]):
    """The lessons of a data set. None is kept as an object: each is made when it is asked for.

    Attributes:
        examples: of which they are, each made when it is asked for.
        prefixes: ``(examples, 2)`` tokens of each one's prefix, and images in it.
        first: ``(examples + 1,)``, where the branches of each begin.
        branches: ``(branches, 3)`` tokens, labels and images of each.
        which: ``(lessons,)``, the example of each lesson.
    """

    examples: Examples
    prefixes: np.ndarray
    first: np.ndarray
    branches: np.ndarray
    which: np.ndarray

    @classmethod
    def of(
        cls, examples: Sequence[Example], counted: Iterable[tuple[int, Sizes]], fewer: Mapping[int, Example]
    ) -> "Lessons":
        """Of ``examples`` all of whose branches are learnt: the place of each, and its sizes.

        Args:
            fewer: by place, those that are learnt with fewer dialogues, and so have those sizes; filled meanwhile.
        """
        examples = Examples.of(examples)
        places, prefixes, first, branches = array("q"), array("i"), array("q", [0]), array("i")
        for place, each in counted:
            places.append(place)
            prefixes.extend(each[:2])
            branches.extend(chain.from_iterable(each.branches))
            first.append(len(branches) // 3)
        numbers = np.array(prefixes).reshape(-1, 2), np.array(first), np.array(branches).reshape(-1, 3)
        return cls(examples.take(places, fewer), *numbers, np.arange(len(places)))

    @overload
    def __getitem__(self, at: int) -> Lesson: ...

    @overload
    def __getitem__(self, at: slice) -> "Lessons": ...

    def __getitem__(self, at: "int | slice") -> "Lesson | Lessons":
        if isinstance(at, slice):
            return self.take(range(len(self))[at])
        i = int(self.which[at])
        start, end = int(self.first[i]), int(self.first[i + 1])
        prefix, in_prefix = self.prefixes[i].tolist()
        branches = (BranchSize(number, *size) for number, size in enumerate(self.branches[start:end].tolist()))
        return Lesson(self.examples[i], prefix, in_prefix, tuple(branches))

    def __len__(self) -> int:
        return len(self.which)

    def take(self, at: Sequence[int] | np.ndarray) -> "Lessons":
        """Those at these places, in this order."""
        return replace(self, which=self.which[np.asarray(at, dtype=np.int64)])

    @property
    def learnt_from(self) -> Examples:
        """The example of each."""
        return self.examples.take(self.which)

    @property
    def images(self) -> Iterator[ImageRef]:
        """Of all of them, those of some lesson more than once if others have them too."""
        return chain.from_iterable(self.learnt_from.images)

    @property
    def weighted(self) -> "Lessons":
        """What an epoch learns from: each as often as the weight of its example says."""
        return self.take(np.repeat(np.arange(len(self)), self.learnt_from.weights))

    @cached_property
    def num_branches(self) -> np.ndarray:
        """``(lessons,)``"""
        return np.diff(self.first)[self.which]

    @cached_property
    def num_tokens(self) -> np.ndarray:
        """``(lessons,)``"""
        ends = np.concatenate([[0], np.cumsum(self.branches[:, 0], dtype=np.int64)])
        return (self.prefixes[:, 0] + ends[self.first[1:]] - ends[self.first[:-1]])[self.which]


class KeptSizes:
    """The sizes of examples that an index has, by all that decides them; and those that are counted now, for it.

    Args:
        name: of the index; None keeps nothing.
    """

    def __init__(self, name: str | None):
        self.table = Table(index_folder() / f"{name}.npz" if name else None)
        self.num_counted = 0
        self._keys = bytearray()
        self._prefixes, self._first, self._branches = array("i"), array("q", [0]), array("i")

    def sizes(self, encoder: Encoder, examples: Examples, grids: Mapping[int, Grids]) -> list[Sizes]:
        """Of the examples at some places with their image grids; texts that are to be counted are tokenised
        together."""
        keys = {place: key_of(examples.said(place), given) for place, given in grids.items()}
        known = {place: self._find(key) for place, key in keys.items()}
        new = {place: examples[place] for place, sizes in known.items() if sizes is None}
        encoder.tokenize_ahead(list(new.values()))
        found = []
        for place, key in keys.items():
            self.num_counted += place in new
            found.append(known[place] or encoder.sizes(new[place].dialogues, as_tensor(grids[place])))
            self._keys += key
            self._prefixes.extend(found[-1][:2])
            self._branches.extend(chain.from_iterable(found[-1].branches))
            self._first.append(len(self._branches) // 3)
        encoder.tokenize_ahead(())
        return found

    def save(self) -> None:
        """Have the index hold all that `sizes` was asked for, if some was new. Raises OSError."""
        if self.num_counted:
            columns = {"prefixes": self._prefixes, "first": self._first, "branches": self._branches}
            self.table.save(bytes(self._keys), {name: np.array(values) for name, values in columns.items()})

    def _find(self, key: bytes) -> Sizes | None:
        if (at := self.table.find(key)) is None:
            return None
        columns = self.table.columns
        start, end = columns["first"][at : at + 2].tolist()
        numbers = columns["branches"][3 * start : 3 * end].tolist()
        prefix, in_prefix = columns["prefixes"][2 * at : 2 * at + 2].tolist()
        return Sizes(prefix, in_prefix, list(zip(*[iter(numbers)] * 3, strict=True)))


def as_tensor(grids: Grids) -> torch.Tensor:
    """``(num_images, 3)``"""
    return torch.tensor(grids, dtype=torch.long).reshape(-1, 3)
