"""Decoding: each image's prefix once, its questions' branches after it, then a token at a time.

A prefix is the image and whatever all questions about it begin with. Its keys and values are shared by the branches,
which are then decoded together, as one batch.
"""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil
import torch
import torch.nn.functional as F

from vlm_lora.inference.caption import Decoding
from vlm_lora.inference.control import Processor, apply, processors
from vlm_lora.model.backbone import Backbone
from vlm_lora.model.features import ImageEntry, crc32, together
from vlm_lora.model.packing import Encoded
from vlm_lora.model.preprocess import Pixels
from vlm_lora.model.recurrent import linear_attentions, state_bytes

MOST_ROWS = 32
"""Captions decoded together at most; beyond it little is gained."""
MEMORY_SHARE = 0.4
"""Of the free memory, for keys, values and activations of a batch whose size is not given."""

FEW_TOKENS = 8
"""Answers of no more tokens do not repay recording a step."""

Step = list[tuple[int, int]]
"""(row, token) of all rows that do not end with this token."""


def decode(
    backbone: Backbone,
    encoded: Sequence[Encoded],
    images: Sequence[Sequence[ImageEntry]],
    decoding: Decoding,
    begun: Sequence[int] = (),
    recorded: bool = True,
) -> Iterator[Step]:
    """The answers' tokens as they are decoded: a row for each branch, in order. Tokens that end an answer are left out.

    ``images`` are those of each of ``encoded``; ``begun`` is what each branch ends with of its answer. A beam search
    gives all its tokens in one step, at its end. ``recorded``: a step may be recorded, where that pays off; while it
    is, no other thread may ask anything of the device.
    """
    steering = processors(backbone.tokenizer, sorted(backbone.eos_token_ids), decoding)
    if decoding.num_beams > 1:
        yield _search(_prefill(backbone, encoded, images, short=1), encoded, decoding, steering, begun)
        return
    rows = _prefill(backbone, encoded, images)
    if recorded and _repays_recording(backbone, decoding):
        rows = _Recorded(rows, decoding.max_new_tokens)
    said = torch.tensor([list(begun)] * len(rows.mask), dtype=torch.long, device=backbone.device)
    numbers = _random_numbers(encoded, images, decoding.seed) if decoding.temperature > 0 else []
    left = torch.arange(len(rows.mask), device=backbone.device)
    ends = torch.tensor(sorted(backbone.eos_token_ids), device=backbone.device)
    for step in range(decoding.max_new_tokens):
        drawn = torch.tensor([numbers[row].random() for row in left.tolist()], device=left.device) if numbers else None
        token = _pick(apply(steering, said, backbone.logits(rows.hidden).float()), drawn)
        going = ~torch.isin(token, ends)
        yield list(zip(left[going].tolist(), token[going].tolist(), strict=True))
        if not going.any() or step + 1 == decoding.max_new_tokens:
            return
        if not going.all():  # rows that have ended leave the batch
            kept = going.nonzero()[:, 0]
            left, token, said = left[kept], token[kept], said[kept]
            rows.select(kept)
        said = torch.cat([said, token[:, None]], dim=1)
        rows.read(token[:, None], torch.ones_like(token[:, None]), (rows.position + 1).expand(3, -1, -1))


def _repays_recording(backbone: Backbone, decoding: Decoding) -> bool:
    on_gpu = backbone.device.type == "cuda"
    return on_gpu and not backbone.family.recurrent and decoding.max_new_tokens > FEW_TOKENS


def rows_that_fit(backbone: Backbone, patches: int, decoding: Decoding) -> int:
    """How many images of ``patches`` patches can be decoded together in the memory that is free now."""
    text, language_model = backbone.model.config.text_config, backbone.language_model
    attention = [layer.self_attn for layer in language_model.layers if hasattr(layer, "self_attn")]
    kept = 2 * len(attention) * text.num_key_value_heads * attention[0].head_dim
    passing = 3 * text.intermediate_size + 8 * text.hidden_size  # one layer's activations
    passing += max((24 * layer.value_dim for layer in linear_attentions(language_model)), default=0)  # it is in float32
    tokens = patches // backbone.merge_size**2 + decoding.max_new_tokens + 64  # 64: template and prompt
    on_gpu = backbone.device.type == "cuda"
    free = torch.cuda.mem_get_info(backbone.device)[0] if on_gpu else psutil.virtual_memory().available
    row = tokens * (kept * decoding.num_beams + passing) * backbone.dtype.itemsize
    row += state_bytes(language_model) * decoding.num_beams
    row += backbone.feature_bytes((1, 1, patches))
    return max(1, min(MOST_ROWS, int(MEMORY_SHARE * free / row)))


class _Rows:
    """``B`` sequences of ``T`` tokens, padded on the left, that have gone through the language model.

    ``mask`` ``(B, T)`` is 0 on padding. Once something is read, ``hidden`` ``(B, hidden)`` is what the model makes of
    each row's last token and ``position`` ``(B, 1)`` where that token stands; ``cache`` holds all keys and values.
    """

    hidden: torch.Tensor
    position: torch.Tensor

    def __init__(self, backbone: Backbone, count: int):
        self.backbone = backbone
        self.cache = backbone.new_cache()
        self.mask = torch.zeros(count, 0, dtype=torch.long, device=backbone.device)

    def read(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor | Pixels | None = None
    ) -> None:
        """Further tokens of every row: ``ids`` and ``mask`` ``(B, t)``, ``positions`` ``(3, B, t)``."""
        self.mask = torch.cat([self.mask, mask], dim=1)
        self.hidden = self.backbone.forward(ids, self.mask, positions, seen, self.cache)[:, -1]
        self.position = positions[0, :, -1:]

    def read_on(self, going: torch.Tensor, ids: torch.Tensor, positions: torch.Tensor) -> None:
        """`read` for the rows ``(B,)`` that are ``going``; the others stay as they are, also in their states."""
        ended = ~going
        before = [self.hidden, self.position, *_states(self.cache)]
        kept = [tensor[ended] for tensor in before]
        self.read(ids, going[:, None].expand_as(ids).long(), positions)
        for tensor, values in zip([self.hidden, self.position, *_states(self.cache)], kept, strict=True):
            tensor[ended] = values

    def select(self, rows: torch.Tensor) -> None:
        """Have these rows alone, by number; one that comes several times is there several times."""
        self.mask = self.mask[rows]
        if self.mask.shape[1]:
            self.cache.reorder_cache(rows)  # linear attention has this and not `batch_select_indices`
            self.hidden, self.position = self.hidden[rows], self.position[rows]


class _Recorded:
    """The rows of a `_Rows`, of which a GPU reads one more token each by a graph (``torch.cuda.graph``): the work of a
    step is recorded once, and then started as one piece, where the host would take longer to start its thousands of
    kernels than the device to run them.

    A graph works on the same memory each time. So keys and values have room for ``room`` tokens from the start, and
    rows that have ended stay in it, unseen.
    """

    all_hidden: torch.Tensor

    def __init__(self, rows: _Rows, room: int):
        self.backbone, self.cache, self.hidden, self.position = rows.backbone, rows.cache, rows.hidden, rows.position
        count, self.read_so_far = rows.mask.shape
        self.rows = torch.arange(count, device=rows.mask.device)
        self.ids = torch.zeros(count, 1, dtype=torch.long, device=rows.mask.device)
        self.positions = torch.zeros(3, count, 1, dtype=torch.long, device=rows.mask.device)
        self.mask = F.pad(rows.mask.bool(), (0, room))[:, None, None]
        before = self.cache.get_seq_length() - self.read_so_far  # of a trained prefix, which the mask leaves out
        self.place = torch.tensor([before + self.read_so_far - 1], device=rows.mask.device)
        self.kept = [
            [F.pad(each, (0, 0, 0, room)) for each in (layer.keys, layer.values)] for layer in self.cache.layers
        ]
        for layer in self.cache.layers:
            layer.keys, layer.values = (each[:, :, :1].clone() for each in (layer.keys, layer.values))
        self.cache.update = self._update
        self.replay: Callable[[], object] | None = None

    def _update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any) -> list[torch.Tensor]:
        for kept, new in zip(self.kept[layer], (keys, values), strict=True):
            kept.index_copy_(2, self.place, new)
        return self.kept[layer]

    def read(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> None:
        """One more token of every row that has not ended; arguments as of `_Rows`."""
        self.ids[self.rows], self.positions[:, self.rows] = ids, positions
        self.mask[self.rows, :, :, self.read_so_far] = mask.bool()[:, None]
        self.read_so_far += 1
        self.place += 1
        if self.replay is None:
            self.replay = self._record()
        self.replay()
        self.hidden, self.position = self.all_hidden[self.rows], positions[0]

    def _record(self) -> Callable[[], object]:
        """What computes ``all_hidden`` ``(B, hidden)`` of what is to be read."""

        def step() -> None:
            self.all_hidden = self.backbone.forward(self.ids, self.mask, self.positions, None, self.cache)[:, -1]

        if self.backbone.device.type != "cuda":
            return step
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step()  # libraries set themselves up, which cannot be recorded; it writes what will be written again
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def select(self, rows: torch.Tensor) -> None:
        """Have these rows alone, by number."""
        self.rows, self.hidden, self.position = self.rows[rows], self.hidden[rows], self.position[rows]


def _prefill(
    backbone: Backbone, encoded: Sequence[Encoded], images: Sequence[Sequence[ImageEntry]], short: int = 0
) -> _Rows:
    """A row for each branch: its image's prefix, computed once for all branches after it, and the branch, ``short`` of
    so many tokens."""
    if all(len(e.branches) == 1 for e in encoded):  # nothing to share: the branch goes with its prefix
        return _read_prefixes(backbone, [_in_one(e, short) for e in encoded], images)
    rows = _read_prefixes(backbone, encoded, images)
    device = backbone.device
    owner = torch.tensor([i for i, e in enumerate(encoded) for _ in e.branches], device=device)
    rows.select(owner)
    branches = [b.input_ids[: len(b.input_ids) - short] for e in encoded for b in e.branches]
    start = torch.tensor([_end(e) for e in encoded], device=device)[owner]
    if backbone.family.recurrent and rows.mask.shape[1]:
        _read_in_stretches(rows, branches, start)
        return rows
    ids, mask = _left_pad(branches, backbone.pad_token_id)
    mask = mask.to(device)
    positions = start[:, None] + (mask.cumsum(1) - 1).clamp(min=0)
    if ids.shape[1]:
        rows.read(ids, mask, positions.expand(3, -1, -1))
    return rows


def _read_in_stretches(rows: _Rows, branches: Sequence[torch.Tensor], start: torch.Tensor) -> None:
    """Branches after the states that their prefixes left, which padding on the left would change: up to the end of the
    shortest, then on to the next one's, and so on. ``start`` ``(B,)`` are their first positions."""
    device = start.device
    lengths = torch.tensor([len(branch) for branch in branches])
    ids = torch.nn.utils.rnn.pad_sequence(list(branches), batch_first=True, padding_value=rows.backbone.pad_token_id)
    done = 0
    for end in lengths.unique().tolist():
        if end == 0:
            continue
        positions = start[:, None] + torch.arange(done, end, device=device)
        rows.read_on((lengths > done).to(device), ids[:, done:end], positions.expand(3, -1, -1))
        done = end


def _read_prefixes(backbone: Backbone, encoded: Sequence[Encoded], images: Sequence[Sequence[ImageEntry]]) -> _Rows:
    """A row for each prefix. What all of them begin with is computed once for all."""
    device = backbone.device
    if not any(len(e.prefix_ids) for e in encoded):  # text only, and nothing in common: branches start from nothing
        return _Rows(backbone, len(encoded))
    # Linear attention must not meet padding after it has begun.
    head = 0 if backbone.family.recurrent else _common_head([e.prefix_ids for e in encoded], backbone.image_token_id)
    rows = _Rows(backbone, 1 if head else len(encoded))
    if head:
        ids, positions = encoded[0].prefix_ids[None, :head], encoded[0].prefix_positions[:, None, :head]
        rows.read(ids, torch.ones(1, head, dtype=torch.long, device=device), positions.to(device))
        rows.select(torch.zeros(len(encoded), dtype=torch.long, device=device))
    ids, mask = _left_pad([e.prefix_ids[head:] for e in encoded], backbone.pad_token_id)
    positions = torch.zeros(3, *ids.shape, dtype=torch.long)
    for i, e in enumerate(encoded):
        positions[:, i, ids.shape[1] - len(e.prefix_ids) + head :] = e.prefix_positions[:, head:]
    seen = together([entry for entries in images for entry in entries], device)
    rows.read(ids, mask.to(device), positions.to(device), seen)
    return rows


def _search(
    rows: _Rows, encoded: Sequence[Encoded], decoding: Decoding, steering: Sequence[Processor], begun: Sequence[int]
) -> Step:
    """The likeliest answers, by transformers' own beam search, which goes on from the keys and values of ``rows``.

    The search begins by reading each row's last token, as it asks for the logits itself. It reads all rows until the
    last one has ended.
    """
    from transformers import GenerationConfig

    backbone, cache = rows.backbone, rows.cache
    model: Any = copy.copy(backbone.model)  # with settings of its own: a model's may punish repetition, or draw
    model.generation_config = GenerationConfig(
        num_beams=decoding.num_beams,
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(backbone.eos_token_ids),
        pad_token_id=backbone.pad_token_id,
    )
    branches = [(e, branch.input_ids) for e in encoded for branch in e.branches]
    last = torch.tensor([[ids[-1]] for _, ids in branches], device=backbone.device)
    position = torch.tensor([[_end(e) + len(ids) - 1] for e, ids in branches], device=backbone.device)
    before = cache.get_seq_length() - rows.mask.shape[1]  # keys and values of a trained prefix, which all tokens see
    ones = rows.mask.new_ones(len(branches), before + 1)
    cache.reorder_cache(torch.arange(len(branches), device=backbone.device).repeat_interleave(decoding.num_beams))
    answer = torch.tensor([list(begun)], dtype=torch.long, device=backbone.device)

    def steer(read: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return apply(steering, torch.cat([answer.expand(len(read), -1), read[:, 1:]], dim=1), scores)

    tokens = model.generate(
        last,
        logits_processor=[steer],
        attention_mask=torch.cat([ones[:, 1:], rows.mask, ones[:, :1]], dim=1),
        position_ids=(position + before).expand(3, -1, -1),
        **{backbone.cache_argument: cache},
    )
    step: Step = []
    for row, answer in enumerate(tokens[:, 1:].tolist()):
        end = next((i for i, token in enumerate(answer) if token in backbone.eos_token_ids), len(answer))
        step += [(row, token) for token in answer[:end]]
    return step


# -- small parts ---------------------------------------------------------------------------------------------


def _end(encoded: Encoded) -> int:
    """The position right after the prefix."""
    return int(encoded.prefix_positions.max()) + 1 if len(encoded.prefix_ids) else 0


def _in_one(encoded: Encoded, short: int) -> Encoded:
    """With the only branch as the end of the prefix too, ``short`` of so many tokens."""
    (branch,) = encoded.branches
    ids = branch.input_ids[: len(branch.input_ids) - short]
    positions = (torch.arange(len(ids)) + _end(encoded)).expand(3, -1)
    return Encoded(
        torch.cat([encoded.prefix_ids, ids]),
        torch.cat([encoded.prefix_positions, positions], dim=1),
        encoded.branches,
    )


def _states(cache: Any) -> list[torch.Tensor]:
    """What layers of linear attention know of the past, a tensor for each kind and layer, all of them of all rows."""
    layers = [layer for layer, linear in zip(cache.layers, cache.is_linear, strict=True) if linear]
    return [state for layer in layers for state in (layer.conv_states[0], layer.recurrent_states[0])]


def _common_head(prefixes: Sequence[torch.Tensor], image_token_id: int) -> int:
    """How many tokens several prefixes begin with alike, before any image and short of anyone's last token."""
    width = min(map(len, prefixes)) - 1
    if len(prefixes) == 1 or width < 1:
        return 0
    rows = torch.stack([prefix[:width] for prefix in prefixes])
    return int(((rows == rows[0]).all(0) & (rows[0] != image_token_id)).long().cumprod(0).sum())


def _left_pad(sequences: Sequence[torch.Tensor], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(B, T)`` tokens with padding on the left, so that all end together, and their mask."""
    width = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), width), pad_token_id)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for i, sequence in enumerate(sequences):
        ids[i, width - len(sequence) :] = sequence
        mask[i, width - len(sequence) :] = 1
    return ids, mask


def _random_numbers(
    encoded: Sequence[Encoded], images: Sequence[Sequence[ImageEntry]], seed: int
) -> list[random.Random]:
    """Random numbers for each row, from its own images and question: the same ones in any batch."""
    numbers = []
    for e, entries in zip(encoded, images, strict=True):
        seen, prefix = [crc32(entry.values) for entry in entries], e.prefix_ids.tolist()
        # Where the prefix ends depends on what else is asked about the image.
        numbers += [random.Random(f"{seed} {seen} {prefix + branch.input_ids.tolist()}") for branch in e.branches]
    return numbers


def _pick(scores: torch.Tensor, drawn: torch.Tensor | None) -> torch.Tensor:
    """The next token of each row, ``(B,)`` from ``(B, vocabulary)`` and, if sampled, a number of 0 to 1 for each."""
    if drawn is None:
        return scores.argmax(-1)
    # In the vocabulary's order: sorted by share, tokens of nearly the same share would change places in another batch.
    shares = scores.softmax(-1)
    upto = shares.cumsum(-1)
    reached = (shares > 0) & (upto > drawn[:, None] * upto[:, -1:])
    # None, where a number of nearly 1 was rounded up. `argmax` of equals is the first one.
    return torch.where(reached.any(-1), reached.int().argmax(-1), shares.argmax(-1))
