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

from vlm_lora.data.example import Dialogue, Example
from vlm_lora.errors import DataError
from vlm_lora.inference.captioner import Captioner
from vlm_lora.inference.evaluate import blank
from vlm_lora.inference.team import ALONE, Team, put_together, share_of
from vlm_lora.model.features import together
from vlm_lora.model.packing import IGNORE_INDEX, pack


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
    team: Team = ALONE,
) -> list[Reviewed]:
    """Every answer about images, lowest score first; those of images that cannot be used at the end. ``team``: the
    processes that share the work, each of which gives all of them."""
    own: list[list[Reviewed]] = []
    pictured = [example for example in examples if example.images]
    for example in share_of(team, pictured):
        own.append(list(_of_example(captioner, example)))
        progress(min(len(own) * team.count, len(pictured)), len(pictured))
    rows = [row for of_example in put_together(team.gather(own)) for row in of_example]
    return sorted(rows, key=lambda row: (row.error is not None, row.score))


def _of_example(captioner: Captioner, example: Example) -> Iterator[Reviewed]:
    name = "+".join(image.name for image in example.images)
    last = [captioner.read(dialogue).turns[-1] for dialogue in example.dialogues]
    plain = [
        Reviewed(name, dialogue.place, turn.user, turn.assistant)
        for dialogue, turn in zip(example.dialogues, last, strict=True)
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
    seen = together(entries, backbone.device)
    for dialogue in example.dialogues:
        encoded = captioner.encoder.encode([_with_last_answer_alone(dialogue)], grid)
        row = pack([[encoded]], backbone.pad_token_id)
        mask, positions = (tensor.to(backbone.device) for tensor in (row.attention_mask, row.position_ids))
        with torch.inference_mode():
            hidden = backbone.forward(row.input_ids, mask, positions, seen, forks=row.forks)
            learnt = row.labels[0, 1:] != IGNORE_INDEX
            logits = backbone.logits(hidden[0, :-1][learnt.to(hidden.device)]).float()
            targets = row.labels[0, 1:][learnt].to(logits.device)
            means.append(-F.cross_entropy(logits, targets).item())
    return means


def _with_last_answer_alone(dialogue: Dialogue) -> Dialogue:
    """The same of which the last answer alone has labels, whatever is learnt of it in training."""
    turns = [replace(turn, weight=0.0) for turn in dialogue.turns]
    return replace(dialogue, turns=(*turns[:-1], replace(turns[-1], weight=1.0)))
