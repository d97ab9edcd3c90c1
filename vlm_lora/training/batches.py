"""The plan: which answers make up which step. A pure function of (data, batch size, seed, step), with no state.

The training answers of an epoch stand in one line, images in an order drawn from (seed, epoch), each image's answers
side by side in an order of their own; step ``t`` takes places ``t * batch_size`` to ``(t + 1) * batch_size`` of all
epochs' lines put together. An image with more answers than that is cut; the answers of any other go together into the
step that has the middle one, for an image cut in two would be computed twice. So every answer is seen once an epoch,
steps have ``batch_size`` answers on average, and a run that resumes at step ``t`` needs to know nothing but ``t``.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

from vlm_lora.model.packing import Encoded, padded_tokens


class Plan:
    """Steps over examples of which number ``i`` has ``num_answers[i]`` dialogues."""

    def __init__(
        self, num_answers: Sequence[int], *, batch_size: int, epochs: float, seed: int, max_steps: int | None = None
    ):
        self.num_answers = tuple(num_answers)
        self.batch_size = batch_size
        self.seed = seed
        self.answers_per_epoch = sum(num_answers)
        self.total_answers = round(self.answers_per_epoch * epochs)
        self._lines: dict[int, list[tuple[int, int, int]]] = {}
        steps = self._step_of(self.total_answers - 1) + 1
        self.num_steps = min(steps, max_steps) if max_steps else steps
        """Optimizer steps; the last may be short of answers."""

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


def micro_batches(items: Sequence[Encoded], max_tokens: int) -> list[list[int]]:
    """Group a step's items, one a row, so that with padding they stay within ``max_tokens``; indices of items.

    Rows of like length go together, so that little is padded. One image a row and not several: under a mask of several
    images the empty part between them is computed too, which costs more than the padding does. An item that is longer
    by itself is a group of its own; `split_long` keeps those rare.
    """
    order = sorted(range(len(items)), key=lambda i: items[i].num_tokens, reverse=True)
    groups: list[list[int]] = []
    for i in order:
        if groups and padded_tokens([items[j] for j in (*groups[-1], i)]) <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def deal(items: Sequence[Encoded], num_processes: int) -> list[list[int]]:
    """A step's items dealt out to processes, as indices of items: the longest first, each to the one that has the
    fewest tokens so far. A pure function, so every process knows what the others do."""
    shares: list[list[int]] = [[] for _ in range(num_processes)]
    loads = [0] * num_processes
    for i in sorted(range(len(items)), key=lambda i: items[i].num_tokens, reverse=True):
        least = loads.index(min(loads))
        shares[least].append(i)
        loads[least] += items[i].num_tokens
    return shares


def split_long(encoded: Encoded, max_tokens: int) -> list[Encoded]:
    """The example in as many rows as it needs for each to fit in ``max_tokens``: branches are dealt out, never cut."""
    rows: list[list] = [[]]
    length = prefix = len(encoded.prefix_ids)
    for branch in encoded.branches:
        if rows[-1] and length + len(branch.input_ids) > max_tokens:
            rows.append([])
            length = prefix
        rows[-1].append(branch)
        length += len(branch.input_ids)
    return [replace(encoded, branches=tuple(row)) for row in rows]
