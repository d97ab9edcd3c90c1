"""Which dialogues of an example fit into the budget of tokens."""

from dataclasses import replace

import torch

from vlm_lora.data.example import Example
from vlm_lora.data.readers import BadRow
from vlm_lora.model.encode import EncodedExample, Encoder
from vlm_lora.model.packing import Encoded


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
        bad.append(BadRow(dialogue.source, dialogue.line, reason))
    if not fit:
        return None, bad
    return EncodedExample(replace(example, dialogues=tuple(fit)), encoder.encode(fit, image_grid_thw)), bad
