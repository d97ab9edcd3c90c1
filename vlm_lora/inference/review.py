"""A second look at captions that are there: how likely the tuned model finds each, with its picture and without.

A caption's score is the mean log-probability of its tokens with the picture, less that with a plain grey image of the
same size in its place: what the picture itself says for the caption, however common or rare its words are. Wrong
captions have the lowest scores.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from vlm_lora.data.example import Example
from vlm_lora.errors import DataError
from vlm_lora.inference.captioner import Captioner
from vlm_lora.inference.evaluate import blank
from vlm_lora.model.features import together
from vlm_lora.model.packing import IGNORE_INDEX, Encoded


@dataclass(frozen=True, slots=True)
class Reviewed:
    """One answer of the data. ``likely`` and ``blind`` are mean log-probabilities of its tokens, with the picture and
    with a grey one; ``error`` says why there are none."""

    image: str
    place: str
    question: str
    answer: str
    likely: float = 0.0
    blind: float = 0.0
    error: str | None = None

    @property
    def score(self) -> float:
        return self.likely - self.blind

    def to_json(self) -> str:
        row = {"image": self.image, "caption": self.answer, "question": self.question, "place": self.place}
        if self.error is not None:
            return json.dumps(row | {"error": self.error}, ensure_ascii=False)
        numbers = {"score": self.score, "log_probability": self.likely, "without_picture": self.blind}
        return json.dumps(row | {name: round(value, 4) for name, value in numbers.items()}, ensure_ascii=False)


def review(
    captioner: Captioner,
    examples: Sequence[Example],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Reviewed]:
    """Every answer of every example, lowest score first; those of images that cannot be used at the end."""
    rows: list[Reviewed] = []
    for done, example in enumerate(examples, start=1):
        rows += _of_example(captioner, example)
        progress(done, len(examples))
    return sorted(rows, key=lambda row: (row.error is not None, row.score))


def _of_example(captioner: Captioner, example: Example) -> Iterator[Reviewed]:
    name = "+".join(image.name for image in example.images)
    plain = [
        Reviewed(name, dialogue.place, dialogue.turns[-1].user, dialogue.turns[-1].assistant)
        for dialogue in example.dialogues
    ]
    try:
        seen = _mean_log_probabilities(captioner, example, example.images)
        blind = _mean_log_probabilities(captioner, example, [blank(image) for image in example.images])
    except DataError as error:
        yield from (replace(row, error=str(error)) for row in plain)
        return
    for row, likely, without in zip(plain, seen, blind, strict=True):
        yield replace(row, likely=likely, blind=without)


def _mean_log_probabilities(captioner: Captioner, example: Example, images: Sequence) -> list[float]:
    """Of the last answer of each of the example's dialogues, with these images."""
    entries = captioner.features.get(images)
    grid = torch.stack([entry.grid_thw for entry in entries])
    backbone, means = captioner.backbone, []
    for dialogue in example.dialogues:
        encoded = captioner.encoder.encode([dialogue], grid)
        ids, positions, labels = _in_one_row(encoded)
        with torch.inference_mode():
            seen = together(entries, backbone.device)
            mask = torch.ones_like(ids, device=backbone.device)
            hidden = backbone.forward(ids, mask, positions.to(backbone.device), seen)
            last = _last_answer(labels)
            logits = backbone.logits(hidden[0, last - 1]).float()
            means.append(-F.cross_entropy(logits, labels[last].to(logits.device)).item())
    return means


def _in_one_row(encoded: Encoded) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens ``(1, T)``, positions ``(3, 1, T)`` and labels ``(T,)`` of prefix and only branch."""
    (branch,) = encoded.branches
    count = len(branch.input_ids)
    start = int(encoded.prefix_positions.max()) + 1 if len(encoded.prefix_ids) else 0
    positions = torch.cat([encoded.prefix_positions, (torch.arange(count) + start).expand(3, -1)], dim=1)
    labels = torch.cat([torch.full((len(encoded.prefix_ids),), IGNORE_INDEX), branch.labels])
    return torch.cat([encoded.prefix_ids, branch.input_ids])[None], positions[:, None], labels


def _last_answer(labels: torch.Tensor) -> torch.Tensor:
    """Where the tokens of the last run of labels stand."""
    learnt = (labels != IGNORE_INDEX).nonzero()[:, 0]
    breaks = (learnt.diff() > 1).nonzero()[:, 0]
    return learnt[int(breaks[-1]) + 1 :] if len(breaks) else learnt
