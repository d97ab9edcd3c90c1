"""The schedule: which answers make up which step. A pure function of (data, batch size, seed, step), with no state.

The training answers of an epoch stand in one line, images in an order drawn from (seed, epoch), each image's answers
side by side in an order of their own; step ``t`` takes places ``t * batch_size`` to ``(t + 1) * batch_size`` of all
epochs' lines put together. An image with more answers than that is cut; the answers of any other go together into the
step that has the middle one, for an image cut in two would be computed twice. So every answer is seen once an epoch,
steps have ``batch_size`` answers on average, and a run that resumes at step ``t`` needs to know nothing but ``t``.
"""

import random
from collections.abc import Sequence

from vlm_lora.config import TrainConfig
from vlm_lora.errors import ConfigError


class Schedule:
    """Steps over examples of which number ``i`` has ``num_answers[i]`` dialogues."""

    def __init__(
        self, num_answers: Sequence[int], *, batch_size: int, epochs: float, seed: int, max_steps: int | None = None
    ):
        self.num_answers = tuple(num_answers)
        self.batch_size = batch_size
        self.seed = seed
        self.answers_per_epoch = sum(num_answers)
        self.total_answers = round(self.answers_per_epoch * epochs)
        if not self.total_answers:
            raise ConfigError(
                f"--epochs {epochs:g} of {self.answers_per_epoch:,} answers is none; expected enough for one answer."
            )
        self._lines: dict[int, list[tuple[int, int, int]]] = {}
        steps = self._step_of(self.total_answers - 1) + 1
        self.num_steps = min(steps, max_steps) if max_steps else steps
        """Optimizer steps; the last may be short of answers."""

    @classmethod
    def of(cls, config: TrainConfig, num_answers: Sequence[int]) -> "Schedule":
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
        chosen: list[tuple[int, list[int]]] = []
        for place in range(first, min((step + 2) * self.batch_size, self.total_answers)):
            if self._step_of(place) != step:
                continue
            example, dialogue, _ = self._at(place)
            if chosen and chosen[-1][0] == example:
                chosen[-1][1].append(dialogue)
            else:
                chosen.append((example, [dialogue]))
        return [(example, tuple(dialogues)) for example, dialogues in chosen]

    def _step_of(self, place: int) -> int:
        _, _, middle = self._at(place)
        return (place - place % self.answers_per_epoch + middle) // self.batch_size

    def _at(self, place: int) -> tuple[int, int, int]:
        epoch, at = divmod(place, self.answers_per_epoch)
        return self._line(epoch)[at]

    def _line(self, epoch: int) -> list[tuple[int, int, int]]:
        """(example, dialogue, the place in this line that decides on the step) of each of the epoch's answers."""
        if epoch not in self._lines:
            draw = random.Random(f"{self.seed}/{epoch}")
            order = list(range(len(self.num_answers)))
            draw.shuffle(order)
            line: list[tuple[int, int, int]] = []
            for example in order:
                dialogues = list(range(self.num_answers[example]))
                draw.shuffle(dialogues)
                start, together = len(line), len(dialogues) <= self.batch_size
                middle = start + (len(dialogues) - 1) // 2
                line += [(example, d, middle if together else start + i) for i, d in enumerate(dialogues)]
            self._lines = {e: kept for e, kept in self._lines.items() if abs(e - epoch) == 1} | {epoch: line}
        return self._lines[epoch]
