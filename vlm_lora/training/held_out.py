"""Which held-out images the loss at a checkpoint is of, so that the work of a run grows as its data does; and which are
captioned there, to watch the run learn.

All of them at each checkpoint would be quadratic: twice the data is twice the checkpoints and twice the images at each.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np

from vlm_lora.config import TrainConfig
from vlm_lora.data.example import Example, ImageRef
from vlm_lora.training.lessons import Lesson, Lessons

SHARE = 0.02
"""The most that the loss at a checkpoint may take of the work of the steps before it."""

FORWARD = 0.5
"""The work of a token that is only scored, over that of one that is learnt from: its backward pass takes as much again
at the least, as gradients go through the whole frozen base."""

LEAST = 16
"""Fewer images say too little, however short the steps between two checkpoints are."""

WATCHED, WATCHED_TOKENS = 4, 48
"""Images that are captioned where --watch does not say how many, and tokens of a caption of theirs at most."""

WATCHED_SHARE = 0.03
"""The most that these captions may take of the work of all steps, where --watch does not insist."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out examples, and the order in which samples of them are taken.

    The sample of n is the first n by the hash of the seed and the images' bytes. So it depends on nothing else, one is
    within the next larger one, and data that is added only moves its border.
    """

    examples: Lessons
    order: np.ndarray
    tokens_of_steps: float
    """Of the steps between two checkpoints."""
    val_images: int | None
    checkpoints: int
    tokens_of_run: float
    """Of all steps."""

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        train: Lessons,
        held_out: Lessons,
        num_steps: int,
        hash_of: Callable[[ImageRef], str],
    ) -> "HeldOut":
        """Those of a run of ``num_steps`` steps over ``train``.

        Args:
            hash_of: of an image's bytes, in hex.
        """

        def rank(i: int) -> bytes:
            return hashlib.sha256(f"{config.seed}:{_content(held_out[i].example, hash_of)}".encode()).digest()

        answers = int(train.num_branches.sum())
        per_step = config.batch_size * int(train.num_tokens.sum()) / answers
        between = min(config.save_every, num_steps)
        order = np.array(sorted(range(len(held_out)), key=rank), dtype=np.int64)
        checkpoints = math.ceil(num_steps / config.save_every)
        return cls(held_out, order, per_step * between, config.val_images, checkpoints, per_step * num_steps)

    @cached_property
    def size(self) -> int:
        """How many a run that begins scores at each checkpoint. All of them, where the only one is at the end."""
        if self.val_images is not None:
            return min(self.val_images, len(self.order))
        if self.checkpoints == 1:
            return len(self.order)
        taken = np.cumsum(self.examples.num_tokens[self.order])
        within = int((taken * FORWARD <= SHARE * self.tokens_of_steps).sum())
        return min(max(within, LEAST), len(self.order))

    def sample(self, size: int) -> Lessons:
        """The sample of so many, in the order of the data."""
        return self.examples.take(np.sort(self.order[:size]))

    def share(self, size: int) -> float:
        """The work of scoring the sample of so many, over that of the steps between two checkpoints."""
        return FORWARD * int(self.examples.num_tokens[self.order[:size]].sum()) / self.tokens_of_steps

    def watched(self, wanted: int | None, is_usable: Callable[[Lesson], bool] = lambda lesson: True) -> list[Lesson]:
        """The examples whose images are captioned at the start and at each checkpoint, the first ones in the order of
        the samples; by default `WATCHED`, or as many as stay within `WATCHED_SHARE`."""
        pictured = (each for each in map(self.examples.__getitem__, self.order) if each.images and is_usable(each))
        few = list(islice(pictured, WATCHED if wanted is None else wanted))
        if wanted is not None:
            return few
        return few[: sum(self.share_of_watching(few[:n]) <= WATCHED_SHARE for n in range(1, len(few) + 1))]

    def share_of_watching(self, watched: Sequence[Lesson]) -> float:
        """The work of all their captions, each as long as it may be, over that of all steps. The work is counted in
        operations; a GPU that decodes so few captions waits for its memory, and takes longer than this share."""
        tokens = sum(each.with_branches([0]).num_tokens + WATCHED_TOKENS for each in watched)
        return FORWARD * tokens * (1 + self.checkpoints) / self.tokens_of_run


def _content(example: Example, hash_of: Callable[[ImageRef], str]) -> str:
    """What the example is ranked by: its images' bytes; of one without images its texts."""
    if example.images:
        return ":".join(map(hash_of, example.images))
    asked = [[(turn.user, turn.assistant) for turn in dialogue.turns] for dialogue in example.dialogues]
    return json.dumps(asked)
