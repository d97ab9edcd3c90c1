"""What examples cost in tokens, from the sizes of their images alone: no tower runs, no weights are read."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlm_lora.data.example import Example, ImageRef
from vlm_lora.model.encode import Encoder
from vlm_lora.model.packing import IGNORE_INDEX, Encoded

AT_ONCE = 256
"""Examples whose texts are tokenised together."""


@dataclass(frozen=True, slots=True)
class TokenCount:
    """The tokens of a data set, and the rows among it that are too long."""

    longest: tuple[int, ...]
    """Tokens of each example's longest sequence: its images and one dialogue."""
    images: tuple[int, ...]
    """Tokens of each image, as often as examples show it."""
    packed: int
    """All that training computes in an epoch: images once an example, and every dialogue."""
    separate: int
    """What it would be with a sequence of its own for each dialogue."""
    learnt: int
    """Tokens with a label."""
    too_long: tuple[tuple[Example, str], ...]
    """Examples with a sequence above the budget, and the reason to give."""
    sample: tuple[tuple[str, bool], ...]
    """The first dialogue as the model reads it: pieces of text, and whether they are learnt."""

    def facts(self) -> dict[str, Any]:
        """For ``--json``. The histogram's keys are upper borders, powers of two."""
        if not self.longest:
            return {}
        ordered, images = sorted(self.longest), sorted(self.images)
        histogram: dict[int, int] = {}
        for tokens in ordered:
            border = 1 << (tokens - 1).bit_length()
            histogram[border] = histogram.get(border, 0) + 1
        return {
            "histogram": {str(border): times for border, times in histogram.items()},
            "median": ordered[len(ordered) // 2],
            "longest": ordered[-1],
            "per_image": {"least": images[0], "median": images[len(images) // 2], "most": images[-1]} if images else {},
            "packed": self.packed,
            "separate": self.separate,
            "learnt": self.learnt,
            "too_long": len(self.too_long),
            "sample": [{"text": text, "learnt": learnt} for text, learnt in self.sample],
        }


def count_tokens(
    encoder: Encoder,
    grid: Callable[[int, int], tuple[int, int, int]],
    examples: Sequence[Example],
    sizes: Mapping[ImageRef, tuple[int, int]],
    max_tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TokenCount:
    """Encode every example as training does.

    Args:
        grid: `Preprocessor.grid`.
        sizes: width and height of every image, upright.
    """
    longest, images, too_long = [], [], []
    packed = separate = learnt = 0
    sample: tuple[tuple[str, bool], ...] = ()
    for done, example in enumerate(examples, start=1):
        if done % AT_ONCE == 1:
            encoder.tokenize_ahead(examples[done - 1 : done - 1 + AT_ONCE])
        grids = torch.tensor([grid(*sizes[ref]) for ref in example.images], dtype=torch.long).reshape(-1, 3)
        encoded = encoder.encode(example.dialogues, grids)
        images += (grids.prod(-1) // encoder.merge_size**2).tolist()
        branches = [len(branch.input_ids) for branch in encoded.branches]
        longest.append(longest_sequence(encoded))
        packed += example.weight * (len(encoded.prefix_ids) + sum(branches))
        separate += example.weight * (len(encoded.prefix_ids) * len(branches) + sum(branches))
        learnt += example.weight * sum(int((branch.labels != IGNORE_INDEX).sum()) for branch in encoded.branches)
        if reason := over_budget(encoded, max_tokens):
            too_long.append((example, reason))
        sample = sample or tuple(_rendered(encoder, encoded))
        progress(done, len(examples))
    return TokenCount(tuple(longest), tuple(images), packed, separate, learnt, tuple(too_long), sample)


def longest_sequence(encoded: Encoded) -> int:
    """Tokens of the prefix and the longest branch."""
    return len(encoded.prefix_ids) + max(len(branch.input_ids) for branch in encoded.branches)


def over_budget(encoded: Encoded, max_tokens: int) -> str | None:
    """Why an example cannot be trained on with this budget, or None."""
    longest = longest_sequence(encoded)
    if longest <= max_tokens:
        return None
    return (
        f"needs {longest} tokens, {len(encoded.prefix_ids)} of them for images and instruction; --max-tokens is "
        f"{max_tokens}. Lower --max-pixels or raise --max-tokens"
    )


def _rendered(encoder: Encoder, encoded: Encoded) -> Iterator[tuple[str, bool]]:
    """Prefix and first branch as text, cut where learning starts or ends; an image is one piece."""
    ids = torch.cat([encoded.prefix_ids, encoded.branches[0].input_ids])
    labels = torch.cat([torch.full_like(encoded.prefix_ids, IGNORE_INDEX), encoded.branches[0].labels])
    kinds = [
        (bool(i == encoder.image_token_id), bool(label != IGNORE_INDEX)) for i, label in zip(ids, labels, strict=True)
    ]
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or kinds[end] != kinds[start]:
            image, learnt = kinds[start]
            piece = ids[start : start + 1] if image else ids[start:end]
            times = f" x {end - start}" if image else ""
            yield encoder.tokenizer.decode(piece.tolist()) + times, learnt
            start = end
