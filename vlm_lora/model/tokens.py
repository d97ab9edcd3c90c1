"""What examples cost in tokens, from the sizes of their images alone: no tower runs, no weights are read."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vlm_lora.data.example import Example, ImageRef
from vlm_lora.data.readers import BadRow, bad_row
from vlm_lora.model.encode import EncodedExample, Encoder
from vlm_lora.model.packing import IGNORE_INDEX, Encoded

AT_ONCE = 256
"""Examples whose texts are tokenised together."""


@dataclass(frozen=True, slots=True)
class TokenCount:
    """The tokens of a data set, and the rows among it that are too long."""

    longest: tuple[int, ...]
    """Tokens of the longest sequence that is kept of each example: its images and one dialogue."""
    images: tuple[int, ...]
    """Tokens of each image, as often as examples show it."""
    packed: int
    """All that training computes in an epoch: images once an example, and every dialogue."""
    separate: int
    """What it would be with a sequence of its own for each dialogue."""
    learnt: int
    """Tokens with a label."""
    examples: tuple[Example, ...]
    """Those given, with the dialogues that fit into the budget; without the ones that have no such."""
    too_long: tuple[BadRow, ...]
    """The rows of the others."""
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
    longest, images, kept, too_long = [], [], [], []
    packed = separate = learnt = 0
    sample: tuple[tuple[str, bool], ...] = ()
    for done, example in enumerate(examples, start=1):
        if done % AT_ONCE == 1:
            encoder.tokenize_ahead(examples[done - 1 : done - 1 + AT_ONCE])
        grids = torch.tensor([grid(*sizes[ref]) for ref in example.images], dtype=torch.long).reshape(-1, 3)
        images += (grids.prod(-1) // encoder.merge_size**2).tolist()
        fitting, bad = encode_fitting(encoder, example, grids, max_tokens)
        too_long += bad
        progress(done, len(examples))
        if fitting is None:
            continue
        example, encoded = fitting.example, fitting.encoded
        kept.append(example)
        branches = [len(branch.input_ids) for branch in encoded.branches]
        longest.append(longest_sequence(encoded))
        packed += example.weight * (len(encoded.prefix_ids) + sum(branches))
        separate += example.weight * (len(encoded.prefix_ids) * len(branches) + sum(branches))
        learnt += example.weight * sum(int((branch.labels != IGNORE_INDEX).sum()) for branch in encoded.branches)
        sample = sample or tuple(_rendered(encoder, encoded))
    counts = tuple(longest), tuple(images), packed, separate, learnt
    return TokenCount(*counts, tuple(kept), tuple(too_long), sample)


def longest_sequence(encoded: Encoded) -> int:
    """Tokens of the prefix and the longest branch."""
    return len(encoded.prefix_ids) + max(len(branch.input_ids) for branch in encoded.branches)


def encode_fitting(
    encoder: Encoder, example: Example, image_grid_thw: torch.Tensor, max_tokens: int
) -> tuple[EncodedExample | None, list[BadRow]]:
    """The example with those of its dialogues that fit into the budget, in tokens, and the rows of the others.

    None instead of the example where nothing of it fits. ``image_grid_thw`` ``(num_images, 3)``.
    """
    encoded = encoder.encode(example.dialogues, image_grid_thw)
    if longest_sequence(encoded) <= max_tokens:
        return EncodedExample(example, encoded), []
    prefix, fit, bad = len(encoded.prefix_ids), [], []
    for dialogue, branch in zip(example.dialogues, encoded.branches, strict=True):
        if (needed := prefix + len(branch.input_ids)) <= max_tokens:
            fit.append(dialogue)
            continue
        reason = (
            f"needs {needed} tokens, {prefix} of them for images and instruction; --max-tokens is {max_tokens}. "
            f"Shorten its text, lower --max-pixels or raise --max-tokens"
        )
        bad.append(bad_row(dialogue.source, reason))
    if not fit:
        return None, bad
    return EncodedExample(replace(example, dialogues=tuple(fit)), encoder.encode(fit, image_grid_thw)), bad


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
