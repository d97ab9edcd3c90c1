"""The schedule: which answers make up which step. A pure function of (data, batch size, seed, step), with no state.

The training answers of an epoch stand in one line, images in an order drawn from (seed, epoch), each image's answers
side by side in an order of their own; step ``t`` takes places ``t * batch_size`` to ``(t + 1) * batch_size`` of all
epochs' lines put together. An image with more answers than that is cut; the answers of any other go together into the
step that has the middle one, for an image cut in two would be computed twice. So every answer is seen once an epoch,
steps have ``batch_size`` answers on average, and a run that resumes at step ``t`` needs to know nothing but ``t``.
"""

import random
from array import array
from collections.abc import Sequence

import numpy as np

from vlm_lora.config import TrainConfig
from vlm_lora.errors import ConfigError


class Schedule:
    """Steps over examples of which number ``i`` has ``num_answers[i]`` dialogues."""

    def __init__(
        self,
        num_answers: Sequence[int] | np.ndarray,
        *,
        batch_size: int,
        epochs: float,
        seed: int,
        max_steps: int | None = None,
    ):
        self.num_answers = np.asarray(num_answers, dtype=np.int64)
        self.batch_size = batch_size
        self.seed = seed
        self.answers_per_epoch = int(self.num_answers.sum())
        self.total_answers = round(self.answers_per_epoch * epochs)
        if not self.total_answers:
            raise ConfigError(
                f"--epochs {epochs:g} of {self.answers_per_epoch:,} answers is none; expected enough for one answer."
            )
        self._lines: dict[int, np.ndarray] = {}
        steps = self._step_of(self.total_answers - 1) + 1
        self.num_steps = min(steps, max_steps) if max_steps else steps
        """Optimizer steps; the last may be short of answers."""

    @classmethod
    def of(cls, config: TrainConfig, num_answers: Sequence[int] | np.ndarray) -> "Schedule":
        """The schedule of a run."""
        return cls(
            num_answers,
            batch_size=config.batch_size,
            epochs=config.epochs,
            seed=config.seed,
            max_steps=config.max_steps,
        )

    def step(self, step: int) -> list[tuple[int, tuple[int, ...]]]:
        """The answers of 0-based ``step``: (example, its dialogues), in order."""
        first = max(0, (step - 1) * self.batch_size)
        last = min((step + 2) * self.batch_size, self.total_answers)
        chosen: list[tuple[int, list[int]]] = []
        for epoch in range(first // self.answers_per_epoch, -(-last // self.answers_per_epoch)):
            start = epoch * self.answers_per_epoch
            line = self._line(epoch)[max(0, first - start) : last - start]
            steps = (start + line[:, 2].astype(np.int64)) // self.batch_size
            for example, dialogue, _ in line[steps == step].tolist():
                if chosen and chosen[-1][0] == example:
                    chosen[-1][1].append(dialogue)
                else:
                    chosen.append((example, [dialogue]))
        return [(example, tuple(dialogues)) for example, dialogues in chosen]

    def _step_of(self, place: int) -> int:
        epoch, at = divmod(place, self.answers_per_epoch)
        return (epoch * self.answers_per_epoch + int(self._line(epoch)[at, 2])) // self.batch_size

    def _line(self, epoch: int) -> np.ndarray:
        """``(answers, 3)``: example, dialogue, the place in this line that decides on the step, of each of the epoch's
        answers."""
        if epoch not in self._lines:
            draw = random.Random(f"{self.seed}/{epoch}")
            order = array("i", range(len(self.num_answers)))
            draw.shuffle(order)  # type: ignore[arg-type]  # an array is as good as a list, of an eighth of its size
            counts = self.num_answers[order]
            drawn = array("i")
            for count in counts.tolist():
                dialogues = list(range(count))
                draw.shuffle(dialogues)
                drawn.extend(dialogues)
            line = np.empty((len(drawn), 3), dtype=np.int32)
            line[:, 0], line[:, 1], line[:, 2] = np.repeat(order, counts), drawn, np.arange(len(drawn))
            middles = np.cumsum(counts) - counts + (counts - 1) // 2
            together = np.repeat(counts <= self.batch_size, counts)
            line[together, 2] = np.repeat(middles, counts)[together]
            self._lines = {e: kept for e, kept in self._lines.items() if abs(e - epoch) == 1} | {epoch: line}
        return self._lines[epoch]
