"""Captions and answers from a base model, with or without an adapter. The public `Captioner`.

Each image's prefix goes through the language model once, whatever is asked about it: its keys and values are shared
by all questions' branches, which are then decoded together.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import psutil
import torch

from vlm_lora.config import DEFAULT_MODEL, DEFAULT_PROMPT
from vlm_lora.data.example import Turn
from vlm_lora.errors import AdapterError, ConfigError, DataError
from vlm_lora.inference.caption import Caption, Decoding, ImageSource, name_of, source_of
from vlm_lora.model.adapters.base import Adapter, Contract, base_of, find_adapter, read_contract
from vlm_lora.model.adapters.methods import load_adapter
from vlm_lora.model.backbone import Backbone, load_backbone
from vlm_lora.model.device import is_out_of_memory
from vlm_lora.model.encode import Encoder
from vlm_lora.model.features import FeatureCache, ImageEntry, cache_folder, crc32, together
from vlm_lora.model.packing import Encoded

MOST_ROWS = 32
"""Captions decoded together at most; beyond it little is gained."""
MEMORY_SHARE = 0.4
"""Of the free memory, for keys, values and activations of a batch whose size is found out."""
WINDOW = 4
"""Images whose sizes differ are gathered for so many batches, and batched by length."""
EVEN = 1.25
"""Sizes that cost less padding than this factor do not differ."""


class Captioner:
    """A base model, with an adapter or without, that speaks about images.

    >>> captioner = Captioner.load(adapter="runs/photos")
    >>> captioner.answer("cat.jpg", "What colour is the cat?")
    >>> for caption in captioner.caption(Path("photos").glob("*.jpg")): print(caption.image, caption.text)
    """

    def __init__(self, backbone: Backbone, adapter: Adapter | None, features: FeatureCache, prompt: str):
        self.backbone = backbone
        self.adapter = adapter
        self.features = features
        self.prompt = prompt
        self.encoder = Encoder(backbone)
        self._base: Captioner | None = None  # of one that `with_adapter` made

    @classmethod
    def load(
        cls,
        model: str | None = None,
        adapter: str | Path | None = None,
        *,
        prompt: str | None = None,
        dtype: str = "auto",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> "Captioner":
        """Load base and adapter.

        Args:
            model: hub name, folder or ``tiny``; by default the base that the adapter names.
            adapter: run folder, adapter folder or hub name; None for the base alone.
            prompt: the instruction for captions; by default the one the adapter was trained with. So with the pixel
                limits.
        """
        folder = find_adapter(adapter) if adapter is not None else None
        contract = read_contract(folder) if folder else None
        if model is None:
            model = base_of(folder) if folder else DEFAULT_MODEL
        if contract:
            prompt = prompt or contract.prompt
            min_pixels = min_pixels or contract.min_pixels
            max_pixels = max_pixels or contract.max_pixels
        limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        base = cls._base_alone(model, prompt, dtype=dtype, quantise=_in_four_bits(contract), **limits)
        return base._tuned(folder, base.backbone.pixel_limits, base.prompt) if folder else base

    @property
    def base(self) -> "Captioner | None":
        """The captioner of the base alone; None where only the tuned model was given."""
        return self if self.adapter is None else self._base

    def with_adapter(self, adapter: str | Path, *, prompt: str | None = None) -> "Captioner":
        """The same base with another adapter, its prompt and pixel limits: the base's weights are shared, not copied.

        Raises:
            AdapterError: the adapter was made for another base, or cannot be read.
        """
        if self.base is None:
            raise ConfigError("This captioner has no base of its own to share; use one that Captioner.load gave.")
        folder = find_adapter(adapter)
        contract = read_contract(folder)
        if contract is None:
            return self.base._tuned(folder, self.base.backbone.pixel_limits, prompt or DEFAULT_PROMPT)
        return self.base._tuned(folder, (contract.min_pixels, contract.max_pixels), prompt or contract.prompt)

    @classmethod
    def load_several(
        cls,
        model: str | None,
        adapters: Sequence[str | Path | None],
        *,
        prompt: str | None = None,
        dtype: str = "auto",
    ) -> list["Captioner"]:
        """A captioner of each adapter, None for the base alone, over one copy of the base's weights.

        Each sees images within its own pixel limits, the base within the first adapter's. Arguments as for `load`.

        Raises:
            AdapterError: QLoRA's adapters and others: the base is kept in four bits for those alone.
        """
        folders = [find_adapter(adapter) for adapter in adapters if adapter is not None]
        contracts = {folder: read_contract(folder) for folder in folders}
        in_four_bits = [folder for folder in folders if _in_four_bits(contracts[folder])]
        others = [folder for folder in folders if folder not in in_four_bits]
        if in_four_bits and others:
            raise AdapterError(
                f"{in_four_bits[0]} was trained by --method qlora, on a base in four bits, and {others[0]} was not: "
                "they cannot share one base. Give them in commands of their own."
            )
        first = next(filter(None, contracts.values()), None)
        limits = {"min_pixels": first.min_pixels, "max_pixels": first.max_pixels} if first else {}
        asked = prompt or (first.prompt if first else None)
        how = limits | {"dtype": dtype, "quantise": bool(in_four_bits)}
        base = cls._base_alone(model or base_of(folders[0]), asked, **how)
        return [base if adapter is None else base.with_adapter(adapter, prompt=prompt) for adapter in adapters]

    def caption(
        self,
        images: Iterable[ImageSource],
        prompt: str | None = None,
        *,
        tuned: bool = True,
        batch_size: int | None = None,
        decoding: Decoding | None = None,
    ) -> Iterator[Caption]:
        """Caption images one after the other, in order; a bad one gives its error and stops nothing.

        Args:
            images: may be a generator: the features of one batch are held, of `WINDOW` where sizes differ.
            batch_size: images decoded together; by default as many as fit into memory, up to `MOST_ROWS`.
        """
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; expected 1 or more images, or None for what fits.")
        decoding = decoding or Decoding()
        requests = [_ask(prompt or self.prompt)]
        window: list[tuple[str, ImageEntry | str]] = []
        for image in images:
            try:
                window.append((name_of(image), self.features.get([source_of(image)])[0]))
            except DataError as error:
                window.append((name_of(image), str(error)))
            sizes = [len(seen.values) for _, seen in window if not isinstance(seen, str)]
            wanted = batch_size or (self._rows_that_fit(max(sizes), decoding) if sizes else MOST_ROWS)
            even = len(sizes) * max(sizes, default=0) <= EVEN * sum(sizes)
            if len(window) >= (wanted if even else WINDOW * wanted):
                yield from self._captions(window, requests, tuned, batch_size, decoding)
                window = []
        yield from self._captions(window, requests, tuned, batch_size, decoding)

    def answer(
        self,
        image: ImageSource,
        question: str | Sequence[str],
        *,
        tuned: bool = True,
        decoding: Decoding | None = None,
    ) -> str | list[str]:
        """The answer to a question about an image, or the answers to several.

        Raises:
            DataError: the image cannot be used.
        """
        questions = [question] if isinstance(question, str) else list(question)
        if not questions:
            return []
        entries = self.features.get([source_of(image)])
        (answers,) = self.generate([(entries, [_ask(q) for q in questions])], tuned=tuned, decoding=decoding)
        return answers[0] if isinstance(question, str) else answers

    def stream(
        self, image: ImageSource, request: str | None = None, *, tuned: bool = True, decoding: Decoding | None = None
    ) -> Iterator[str]:
        """The answer so far, again after each token."""
        entries = self.features.get([source_of(image)])
        said: list[int] = []
        for _, token in self._tokens([(entries, [_ask(request or self.prompt)])], tuned, decoding or Decoding()):
            said.append(token)
            yield self.encoder.decode(said)

    def generate(
        self,
        asked: Sequence[tuple[Sequence[ImageEntry], Sequence[Sequence[Turn]]]],
        *,
        tuned: bool = True,
        decoding: Decoding | None = None,
    ) -> list[list[str]]:
        """Answers to several requests about each of several (lists of) images, decoded as one batch.

        A request is a conversation of which the last turn is to be answered.
        """
        flat: list[list[int]] = [[] for _, requests in asked for _ in requests]
        for row, token in self._tokens(asked, tuned, decoding or Decoding()):
            flat[row].append(token)
        texts = iter([self.encoder.decode(tokens) for tokens in flat])
        return [[next(texts) for _ in requests] for _, requests in asked]

    # -- inside --------------------------------------------------------------------------------------------------

    @classmethod
    def _base_alone(cls, model: str, prompt: str | None, **how) -> "Captioner":
        """``how`` the base is loaded is `load_backbone`'s."""
        backbone = load_backbone(model, **how)
        # Read from the disk cache, but do not fill it: most folders are captioned once.
        features = FeatureCache(backbone, cache_folder(), write=False)
        return cls(backbone, None, features, prompt or DEFAULT_PROMPT)

    def _tuned(self, folder: Path, pixel_limits: tuple[int, int], prompt: str) -> "Captioner":
        backbone = self.backbone.twin(*pixel_limits)
        adapter = load_adapter(backbone, folder)
        same = pixel_limits == self.backbone.pixel_limits and not backbone.tower_adapted
        features = self.features if same else FeatureCache(backbone, cache_folder(), write=False)
        captioner = Captioner(backbone, adapter, features, prompt)
        captioner._base = self
        return captioner

    def _captions(self, window, requests, tuned: bool, batch_size: int | None, decoding: Decoding) -> Iterator[Caption]:
        """Captions of the window's images, in order, from batches of images of like size."""
        order = [i for i, (_, seen) in enumerate(window) if not isinstance(seen, str)]
        order.sort(key=lambda i: -len(window[i][1].values))
        told: dict[int, str] = {}
        while order:
            rows = batch_size or self._rows_that_fit(len(window[order[0]][1].values), decoding)
            batch, order = order[:rows], order[rows:]
            answers = self._within_memory([([window[i][1]], requests) for i in batch], tuned, decoding)
            told |= {i: text for i, (text,) in zip(batch, answers, strict=True)}
        for i, (name, seen) in enumerate(window):
            yield Caption(name, error=seen) if isinstance(seen, str) else Caption(name, text=told[i])

    def _within_memory(self, asked, tuned: bool, decoding: Decoding) -> list[list[str]]:
        """`generate`, in halves where the device's memory is not enough for all at once."""
        try:
            return self.generate(asked, tuned=tuned, decoding=decoding)
        except (RuntimeError, MemoryError) as error:
            if len(asked) == 1 or not is_out_of_memory(error):
                raise
        torch.cuda.empty_cache()
        half = len(asked) // 2
        return [
            answers for part in (asked[:half], asked[half:]) for answers in self._within_memory(part, tuned, decoding)
        ]

    def _rows_that_fit(self, patches: int, decoding: Decoding) -> int:
        """How many images of so many patches can be decoded together in the memory that is free now."""
        text = self.backbone.model.config.text_config
        head_dim = self.backbone.language_model.layers[0].self_attn.head_dim
        kept = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim
        passing = 3 * text.intermediate_size + 8 * text.hidden_size  # one layer's activations
        tokens = patches // self.backbone.merge_size**2 + decoding.max_new_tokens + 64  # 64: template and prompt
        on_gpu = self.backbone.device.type == "cuda"
        free = torch.cuda.mem_get_info(self.backbone.device)[0] if on_gpu else psutil.virtual_memory().available
        row = tokens * (kept * decoding.num_beams + passing) * self.backbone.dtype.itemsize
        row += self.backbone.feature_bytes((1, 1, patches))
        return max(1, min(MOST_ROWS, int(MEMORY_SHARE * free / row)))

    def _tokens(self, asked, tuned: bool, decoding: Decoding) -> Iterator[tuple[int, int]]:
        """(row, token) as they are decoded, a row for each request in order, without the tokens that end an answer."""

        def switch() -> AbstractContextManager:
            return self.adapter.switched_off() if self.adapter and not tuned else nullcontext()

        encoded = []
        with switch():  # a trained prompt is part of the tokens
            for entries, requests in asked:
                grids = [entry.grid_thw for entry in entries]
                grid = torch.stack(grids) if grids else torch.zeros(0, 3, dtype=torch.long)
                encoded.append(self.encoder.encode_requests(requests, grid))
        steps = self._decode(encoded, [entries for entries, _ in asked], decoding)
        while True:
            # Entered for each step anew: whoever takes the tokens finds gradients and adapter as they were.
            with torch.inference_mode(), switch():
                step = next(steps, None)
            if step is None:
                return
            yield from step

    def _decode(
        self, encoded: Sequence[Encoded], images: Sequence[Sequence[ImageEntry]], decoding: Decoding
    ) -> Iterator[list[tuple[int, int]]]:
        """The (row, token) pairs of each step. Each of ``encoded`` has its own ``images``."""
        backbone, device = self.backbone, self.backbone.device
        cache = backbone.new_cache()
        owner = torch.tensor([i for i, e in enumerate(encoded) for _ in e.branches], device=device)

        alone = all(len(e.branches) == 1 for e in encoded)
        if alone:  # nothing to share: the branch goes with its prefix
            encoded = [_in_one(e) for e in encoded]

        # 1. Every image's prefix, once, and what all of them begin with once for all. Without any prefix (text only),
        # branches start from nothing.
        mask = torch.zeros(len(owner), 0, dtype=torch.long, device=device)
        if any(len(e.prefix_ids) for e in encoded):
            head = _common_head([e.prefix_ids for e in encoded], backbone.image_token_id)
            mask = torch.ones(len(encoded), head, dtype=torch.long, device=device)
            if head:
                ids, positions = encoded[0].prefix_ids[None, :head], encoded[0].prefix_positions[:, None, :head]
                backbone.forward(ids, mask[:1], positions.to(device), None, cache)
                cache.batch_select_indices(torch.zeros(len(encoded), dtype=torch.long, device=device))
            ids, prefix_mask = _left_pad([e.prefix_ids[head:] for e in encoded], backbone.pad_token_id)
            positions = torch.zeros(3, *ids.shape, dtype=torch.long)
            for i, e in enumerate(encoded):
                positions[:, i, ids.shape[1] - len(e.prefix_ids) + head :] = e.prefix_positions[:, head:]
            positions = positions.to(device)
            seen = together([entry for entries in images for entry in entries], device)
            mask = torch.cat([mask, prefix_mask.to(device)], dim=1)
            hidden = backbone.forward(ids, mask, positions, seen, cache)[:, -1]
            position = positions[0, :, -1:]

        # 2. Every branch behind its image's keys and values.
        if not alone:
            if mask.shape[1]:
                cache.batch_select_indices(owner)
                mask = mask[owner]
            ids, branch_mask = _left_pad([b.input_ids for e in encoded for b in e.branches], backbone.pad_token_id)
            starts = [int(e.prefix_positions.max()) + 1 if len(e.prefix_ids) else 0 for e in encoded]
            start = torch.tensor(starts, device=device)[owner]
            branch_mask = branch_mask.to(device)
            mask = torch.cat([mask, branch_mask], dim=1)
            position = start[:, None] + (branch_mask.cumsum(1) - 1).clamp(min=0)
            hidden = backbone.forward(ids, mask, position.expand(3, -1, -1), None, cache)[:, -1]
            position = position[:, -1:]

        # 3. A token at a time, for the rows that go on.
        if decoding.num_beams > 1:
            yield self._beam_search(hidden, cache, mask, position, decoding)
            return
        rows = torch.arange(len(owner), device=device)
        ends = torch.tensor(sorted(backbone.eos_token_ids), device=device)
        luck = _luck(encoded, images, decoding.seed) if decoding.temperature > 0 else []
        for step in range(decoding.max_new_tokens):
            drawn = torch.tensor([luck[row].random() for row in rows.tolist()], device=device) if luck else None
            token = _pick(backbone.logits(hidden).float(), decoding, drawn)
            going = ~torch.isin(token, ends)
            yield list(zip(rows[going].tolist(), token[going].tolist(), strict=True))
            if not going.any() or step + 1 == decoding.max_new_tokens:
                return
            if not going.all():  # rows that have ended leave the batch
                kept = going.nonzero()[:, 0]
                cache.batch_select_indices(kept)
                rows, token, mask, position = rows[kept], token[kept], mask[kept], position[kept]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            position = position + 1
            hidden = backbone.forward(token[:, None], mask, position.expand(3, -1, -1), None, cache)[:, -1]

    def _beam_search(
        self, hidden: torch.Tensor, cache, mask: torch.Tensor, position: torch.Tensor, decoding: Decoding
    ) -> list[tuple[int, int]]:
        """All (row, token) pairs of the likeliest answers found, by mean log-probability of their tokens.

        The same search as transformers' ``generate(num_beams=...)`` at its defaults (length penalty 1).
        """
        backbone, width = self.backbone, decoding.num_beams
        rows = list(range(len(hidden)))  # that are still searched
        beams = {row: [(0.0, [])] for row in rows}  # (sum of log-probabilities, tokens) that can go on, best first
        ended: dict[int, list[tuple[float, list[int]]]] = {row: [] for row in rows}  # (mean, tokens), best first
        tried = width * (1 + len(backbone.eos_token_ids))  # so that enough of them do not end
        for step in range(1, decoding.max_new_tokens + 1):
            shares = backbone.logits(hidden).float().log_softmax(-1)
            sums = torch.tensor([[total for total, _ in beams[row]] for row in rows], device=shares.device)
            totals = (shares.view(len(rows), -1, shares.shape[-1]) + sums[:, :, None]).flatten(1)
            best, index = (found.tolist() for found in totals.topk(min(tried, totals.shape[1])))
            parents, left = [], []  # of the beams that go on: where they stood in the batch
            for at, row in enumerate(rows):
                before, beams[row], origin = beams[row], [], []
                for rank, (total, place) in enumerate(zip(best[at], index[at], strict=True)):
                    parent, token = divmod(place, shares.shape[-1])
                    said = [*before[parent][1], token]
                    if token in backbone.eos_token_ids or step == decoding.max_new_tokens:
                        if rank < width:
                            ended[row].append((total / step, said))
                    elif len(beams[row]) < width:
                        beams[row].append((total, said))
                        origin.append(at * len(before) + parent)
                ended[row] = sorted(ended[row], key=lambda answer: -answer[0])[:width]
                full = len(ended[row]) == width
                if beams[row] and not (full and beams[row][0][0] / step <= ended[row][-1][0]):
                    left.append(row)
                    parents += origin
            rows = left
            if not rows:
                break
            chosen = torch.tensor(parents, device=mask.device)
            cache.batch_select_indices(chosen)
            mask = torch.cat([mask[chosen], mask.new_ones(len(chosen), 1)], dim=1)
            position = position[chosen] + 1
            token = torch.tensor([said[-1] for row in rows for _, said in beams[row]], device=mask.device)
            hidden = backbone.forward(token[:, None], mask, position.expand(3, -1, -1), None, cache)[:, -1]
        answers = ((row, found[0][1]) for row, found in ended.items())
        return [(row, token) for row, said in answers for token in said if token not in backbone.eos_token_ids]


def _in_four_bits(contract: Contract | None) -> bool:
    """Whether the base is to be quantised: QLoRA's adapters hold for that base alone."""
    return contract is not None and contract.method == "qlora"


def _ask(question: str) -> tuple[Turn]:
    return (Turn(question, ""),)


def _in_one(encoded: Encoded) -> Encoded:
    """With the only branch as the end of the prefix too."""
    (branch,) = encoded.branches
    start = int(encoded.prefix_positions.max()) + 1 if len(encoded.prefix_ids) else 0
    positions = torch.arange(start, start + len(branch.input_ids)).expand(3, -1)
    return Encoded(
        torch.cat([encoded.prefix_ids, branch.input_ids]),
        torch.cat([encoded.prefix_positions, positions], dim=1),
        encoded.branches,
    )


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


def _luck(encoded: Sequence[Encoded], images: Sequence[Sequence[ImageEntry]], seed: int) -> list[random.Random]:
    """Random numbers for each row, from its own images and question: the same ones in any batch."""
    luck = []
    for e, entries in zip(encoded, images, strict=True):
        seen = [crc32(entry.values) for entry in entries]
        luck += [random.Random(f"{seed} {seen} {branch.input_ids.tolist()}") for branch in e.branches]
    return luck


def _pick(logits: torch.Tensor, decoding: Decoding, drawn: torch.Tensor | None) -> torch.Tensor:
    """The next token of each row, ``(B,)`` from ``(B, vocabulary)`` and, if sampled, a number of 0 to 1 for each."""
    if drawn is None:
        return logits.argmax(-1)
    shares, tokens = (logits / decoding.temperature).softmax(-1).sort(-1, descending=True)
    before = shares.cumsum(-1) - shares
    shares = shares.masked_fill(before >= decoding.top_p, 0.0)  # nucleus sampling, arXiv:1904.09751
    upto = shares.cumsum(-1)
    place = (upto <= drawn[:, None] * upto[:, -1:]).sum(-1, keepdim=True)
    return tokens.gather(-1, place.clamp(max=shares.shape[-1] - 1))[:, 0]
