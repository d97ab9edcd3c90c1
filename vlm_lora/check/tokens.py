"""What a data set costs in tokens, from the sizes of its images alone: no tower runs, no weights are read."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch

from vlm_lora.check.dataset import Check
from vlm_lora.config import TrainConfig
from vlm_lora.data.example import Example, ImageRef
from vlm_lora.data.readers import BadRow
from vlm_lora.model.encode import AT_ONCE, Encoder
from vlm_lora.model.packing import IGNORE_INDEX, Encoded
from vlm_lora.model.preprocess import Preprocessor, load_preprocessor


def with_tokens(check: Check, config: TrainConfig, progress: Callable[[int, int], None]) -> Check:
    """The check with its tokens; the rows that need more than ``config.max_tokens`` are bad then."""
    base = load_preprocessor(config.model, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    sizes = {ref: seen.size for ref, seen in check.seen.items()}
    tokens, train, too_long = count_tokens(base, check.examples, sizes, config.max_tokens, progress)
    _, held_out, more = count_tokens(base, check.held_out, sizes, config.max_tokens, progress)
    bad = (*check.bad, *too_long, *more)
    return replace(check, examples=tuple(train), held_out=tuple(held_out), bad=bad, tokens=tokens)


def count_tokens(
    base: Preprocessor,
    examples: Sequence[Example],
    image_sizes: Mapping[ImageRef, tuple[int, int]],
    max_tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Any], list[Example], list[BadRow]]:
    """Count the tokens of every example as training has them.

    Args:
        image_sizes: width and height of every image, upright.

    Returns:
        For ``--json``, numbers of tokens: a histogram of the longest sequence of each example (its images and one
        dialogue) by upper borders, powers of two; of each image; and of an epoch, ``packed`` as training computes
        them, ``separate`` with a sequence for each dialogue, ``learnt`` those with a label. Then the examples, with
        the dialogues that fit into ``max_tokens``, and the rows of the others.
    """
    encoder = Encoder(base)
    longest, images, kept, too_long, sample = [], [], [], [], []
    sums: Counter[str] = Counter(packed=0, separate=0, learnt=0)
    for done, example in enumerate(examples, start=1):
        if done % AT_ONCE == 1:
            encoder.tokenize_ahead(examples[done - 1 : done - 1 + AT_ONCE])
        grids = torch.tensor([base.grid(*image_sizes[ref]) for ref in example.images], dtype=torch.long).reshape(-1, 3)
        images += (grids.prod(-1) // encoder.merge_size**2).tolist()
        fitting, sizes, bad = encoder.fitting(example, grids, max_tokens)
        too_long += bad
        progress(done, len(examples))
        if fitting is None:
            continue
        kept.append(fitting)
        longest.append(sizes.longest_sequence)
        prefix, branches = sizes.prefix, [tokens for tokens, _, _ in sizes.branches]
        sums["packed"] += example.weight * (prefix + sum(branches))
        sums["separate"] += example.weight * (prefix * len(branches) + sum(branches))
        sums["learnt"] += example.weight * sum(labels for _, labels, _ in sizes.branches)
        if not sample:
            encoded = encoder.encode(fitting.dialogues, grids)
            sample = [{"text": text, "learnt": learnt} for text, learnt in _rendered(encoder, encoded)]
    if not longest:
        return {}, kept, too_long
    longest.sort()
    images.sort()
    facts = {
        "histogram": dict(Counter(str(1 << (tokens - 1).bit_length()) for tokens in longest)),
        "median": longest[len(longest) // 2],
        "longest": longest[-1],
        "per_image": {"least": images[0], "median": images[len(images) // 2], "most": images[-1]} if images else {},
        **sums,
        "too_long": len(too_long),
        "sample": sample,
    }
    return facts, kept, too_long


def _rendered(encoder: Encoder, encoded: Encoded) -> Iterator[tuple[str, bool]]:
    """Prefix and first branch as text, and whether it is learnt, cut where that changes; an image is one piece."""
    ids = torch.cat([encoded.prefix_ids, encoded.branches[0].input_ids]).tolist()
    labels = torch.cat([torch.full_like(encoded.prefix_ids, IGNORE_INDEX), encoded.branches[0].labels]).tolist()
    kinds = [(id == encoder.image_token_id, label != IGNORE_INDEX) for id, label in zip(ids, labels, strict=True)]
    for (is_image, is_learnt), piece in groupby(zip(kinds, ids, strict=True), key=itemgetter(0)):
        pieces = [id for _, id in piece]
        text = encoder.tokenizer.decode(pieces[:1] if is_image else pieces)
        yield (f"{text} x {len(pieces)}" if is_image else text), is_learnt
