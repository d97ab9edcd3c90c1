"""Many images and all that is said about them, in rows: mask, M-RoPE positions, labels.

A row holds, one after the other, each image's prefix and its branches::

    [prefix A][branch A1][branch A2][prefix B][branch B1] ...

A branch sees its own prefix and itself, nothing else, and its positions start right after the prefix, whatever
branches stand between. So every branch computes exactly what it would compute in a sequence of its own, and the
prefix, which under a causal mask never sees a branch, is computed once for all of them. For a prefix of two tokens
and branches of two and one::

         p p a a b
      p  x
      p  x x
      a  x x x
      a  x x x x
      b  x x . . x        positions: 0 1 2 3 2
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from vlm_lora.model.recurrent import Forks, find_forks

IGNORE_INDEX = -100
"""The label of a token that carries no loss; the field's number, and torch's default."""


@dataclass(frozen=True, slots=True)
class Branch:
    """One conversation after a prefix.

    ``input_ids`` and ``labels`` are both ``(L,)``; ``labels`` is `IGNORE_INDEX` outside the answers, and always on the
    first token: the next-token shift would otherwise predict it from a neighbour's last token.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor | None = None
    """``(3, L)``, counted from the end of the prefix, where images stand in it; None: text, that counts up."""
    weights: torch.Tensor | None = None
    """``(L,)``, what the loss of each token is multiplied by; None: 1 of all."""
    num_images: int = 0
    """How many images stand in it: those of the example after the prefix's."""

    def __post_init__(self) -> None:
        assert len(self.input_ids) == len(self.labels) > 0
        assert self.labels[0] == IGNORE_INDEX, "a branch must begin with a token that carries no loss"


@dataclass(frozen=True, slots=True)
class Encoded:
    """An example in tokens: the shared prefix ``(P,)``, its positions ``(3, P)``, the branches after it."""

    prefix_ids: torch.Tensor
    prefix_positions: torch.Tensor
    branches: tuple[Branch, ...]
    images_in_prefix: int | None = None
    """How many of the example's images, the first ones, stand in the prefix; None: all."""

    @property
    def num_tokens(self) -> int:
        return len(self.prefix_ids) + sum(len(branch.input_ids) for branch in self.branches)

    def unlabelled(self) -> "Encoded":
        """The same tokens, of which none carries loss."""
        branches = (replace(each, labels=torch.full_like(each.labels, IGNORE_INDEX)) for each in self.branches)
        return replace(self, branches=tuple(branches))


@dataclass(frozen=True, slots=True)
class Packed:
    """What the language model takes: ``B`` rows of ``T`` tokens.

    ``input_ids`` and ``labels`` ``(B, T)``, ``position_ids`` ``(3, B, T)``, ``attention_mask`` a boolean
    ``(B, 1, W, T)``, true where the token may see the column's: that of the row's last ``W`` tokens. Those before, if
    there are any, see what stands before them. It goes with `packed_attention` only: eager attention would add it as
    zeros and ones, in silence. ``forks`` says the same to layers that see no mask.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    forks: Forks
    weights: torch.Tensor | None = None
    """``(B, T)``, what the loss of each token is multiplied by; None: 1 of all."""


def mrope_positions(
    input_ids: torch.Tensor, image_grid_thw: torch.Tensor, image_token_id: int, spatial_merge_size: int
) -> torch.Tensor:
    """Multimodal rotary positions of one sequence, as Qwen2-VL numbers them (arXiv:2409.12191, section 2.1).

    Args:
        input_ids: ``(T,)``.
        image_grid_thw: ``(num_images, 3)`` patches in time, height, width, before the 2x2 merge.

    Returns:
        ``(3, T)``: text counts up alike on all three axes; an image's tokens take their place in its grid, and what
        follows goes on after the longer side.
    """
    positions = torch.zeros(3, len(input_ids), dtype=torch.long)
    is_image = (input_ids == image_token_id).tolist()
    grids = iter(image_grid_thw.tolist())
    at = start = 0
    while at < len(is_image):
        if is_image[at]:
            t, h, w = next(grids)
            h, w = h // spatial_merge_size, w // spatial_merge_size
            grid = torch.stack(torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij"))
            positions[:, at : at + t * h * w] = grid.reshape(3, -1) + start
            at += t * h * w
            start += max(h, w)
        else:
            positions[:, at] = start
            at += 1
            start += 1
    return positions


def pack(rows: Sequence[Sequence[Encoded]], pad_token_id: int) -> Packed:
    """Lay out each row's examples one after the other and pad the rows to the longest; one mask for all."""
    return _pack(rows, pad_token_id, 0)


def pack_apart(examples: Sequence[Encoded], pad_token_id: int) -> Packed:
    """A row for each example, all branches from the same column on, under a mask of the branches alone::

        [prefix A      ][branch A1][branch A2]
        [prefix B][pad ][branch B1][pad      ]

    Padding after a prefix is seen by nobody but itself: the prefix is causal, and the mask leaves it out.
    """
    return _pack([[encoded] for encoded in examples], pad_token_id, max(len(e.prefix_ids) for e in examples))


def padded_tokens(prefixes: Sequence[int], num_tokens: Sequence[int]) -> int:
    """Tokens of examples as `pack_apart` lays them out, padding included, from those of their prefixes and of all."""
    rest = max(tokens - prefix for tokens, prefix in zip(num_tokens, prefixes, strict=True))
    return len(prefixes) * (max(prefixes) + rest)


def _pack(rows: Sequence[Sequence[Encoded]], pad_token_id: int, start: int) -> Packed:
    """Branches begin at column ``start`` or after it, and the mask is that of the tokens from there on."""
    lengths = [sum(max(start, len(e.prefix_ids)) + e.num_tokens - len(e.prefix_ids) for e in row) for row in rows]
    width = max(lengths)
    input_ids = torch.full((len(rows), width), pad_token_id)
    labels = torch.full((len(rows), width), IGNORE_INDEX)
    position_ids = torch.zeros(3, len(rows), width, dtype=torch.long)
    weights = None
    if any(branch.weights is not None for row in rows for encoded in row for branch in encoded.branches):
        weights = torch.ones(len(rows), width)
    # Which example and which of its branches a token belongs to; branch 0 is the prefix, example -1 is padding.
    example_of = torch.full((len(rows), width), -1)
    branch_of = torch.zeros(len(rows), width, dtype=torch.long)
    prefixes: list[range] = []
    branches: list[tuple[int, range]] = []

    for r, row in enumerate(rows):
        at = 0
        for e, encoded in enumerate(row):
            end = at + len(encoded.prefix_ids)
            input_ids[r, at:end] = encoded.prefix_ids
            position_ids[:, r, at:end] = encoded.prefix_positions
            example_of[r, at:end] = e
            prefixes.append(range(r * width + at, r * width + end))
            restart = int(encoded.prefix_positions.max()) + 1 if len(encoded.prefix_ids) else 0
            at = max(start, end)
            for b, branch in enumerate(encoded.branches, start=1):
                end = at + len(branch.input_ids)
                input_ids[r, at:end] = branch.input_ids
                labels[r, at:end] = branch.labels
                counted = torch.arange(end - at) if branch.positions is None else branch.positions
                position_ids[:, r, at:end] = restart + counted
                if weights is not None and branch.weights is not None:
                    weights[r, at:end] = branch.weights
                example_of[r, at:end] = e
                branch_of[r, at:end] = b
                branches.append((len(prefixes) - 1, range(r * width + at, r * width + end)))
                at = end

    same_example = example_of[:, start:, None] == example_of[:, None, :]
    visible = (branch_of[:, None, :] == 0) | (branch_of[:, start:, None] == branch_of[:, None, :])
    causal = torch.ones(width - start, width, dtype=torch.bool).tril(start)
    attention_mask = (same_example & visible & causal)[:, None]
    forks = find_forks(prefixes, branches, (len(rows), width))
    return Packed(input_ids, labels, position_ids, attention_mask, forks, weights)
