"""Captions and answers from a base model, with or without an adapter. The public `Captioner`.

Each image's prefix goes through the language model once, whatever is asked about it: its keys and values are shared
by all questions' branches, which are then decoded together.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from vlm_lora.config import DEFAULT_MAX_NEW_TOKENS, DEFAULT_MODEL, DEFAULT_PROMPT
from vlm_lora.data.example import ImageRef, Turn
from vlm_lora.data.images import load_image
from vlm_lora.errors import ConfigError, DataError
from vlm_lora.model.adapters.base import Adapter, base_of, find_adapter, read_contract
from vlm_lora.model.adapters.methods import load_adapter
from vlm_lora.model.backbone import Backbone, load_backbone
from vlm_lora.model.encode import Encoder
from vlm_lora.model.features import FeatureCache, ImageFeatures, cache_folder
from vlm_lora.model.packing import Encoded

ImageSource = ImageRef | Image.Image | bytes | str | Path


@dataclass(frozen=True, slots=True)
class Caption:
    """What was said about one image, or why nothing was: exactly one of ``text`` and ``error`` is given."""

    image: str
    text: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """How answers are decoded. ``temperature`` 0 is greedy: the likeliest token each time."""

    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens is {self.max_new_tokens}; expected 1 or more.")
        if self.temperature < 0:
            raise ConfigError(f"--temperature is {self.temperature}; expected 0 (greedy) or more.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p is {self.top_p}; expected above 0 and up to 1.")


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
            adapter: run folder or adapter folder; None for the base alone.
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
        quantise = contract is not None and contract.method == "qlora"
        backbone = load_backbone(model, dtype=dtype, min_pixels=min_pixels, max_pixels=max_pixels, quantise=quantise)
        loaded = load_adapter(backbone, folder) if folder else None
        # Read from the disk cache, but do not fill it: most folders are captioned once.
        features = FeatureCache(backbone, cache_folder(), write=False)
        return cls(backbone, loaded, features, prompt or DEFAULT_PROMPT)

    def caption(
        self,
        images: Iterable[ImageSource],
        prompt: str | None = None,
        *,
        tuned: bool = True,
        batch_size: int = 16,
        decoding: Decoding | None = None,
    ) -> Iterator[Caption]:
        """Caption images one after the other, in order; a bad one gives its error and stops nothing.

        ``images`` may be a generator: at most ``batch_size`` images are held at a time.
        """
        decoding = decoding or Decoding()
        batch: list[tuple[str, list[ImageFeatures] | str]] = []
        for image in images:
            try:
                name, source = _named(image)
                batch.append((name, self.features.get([source])))
            except DataError as error:
                batch.append((str(getattr(image, "name", image)), str(error)))
            if len(batch) == batch_size:
                yield from self._captions(batch, prompt, tuned, decoding)
                batch = []
        yield from self._captions(batch, prompt, tuned, decoding)

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
        entries = self.features.get([_named(image)[1]])
        (answers,) = self.generate([(entries, [_ask(q) for q in questions])], tuned=tuned, decoding=decoding)
        return answers[0] if isinstance(question, str) else answers

    def stream(
        self, image: ImageSource, request: str | None = None, *, tuned: bool = True, decoding: Decoding | None = None
    ) -> Iterator[str]:
        """The answer so far, again after each token."""
        entries = self.features.get([_named(image)[1]])
        said: list[int] = []
        for _, token in self._tokens([(entries, [_ask(request or self.prompt)])], tuned, decoding or Decoding()):
            said.append(token)
            yield self.encoder.decode(said)

    def generate(
        self,
        asked: Sequence[tuple[Sequence[ImageFeatures], Sequence[Sequence[Turn]]]],
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

    def _captions(self, batch, prompt: str | None, tuned: bool, decoding: Decoding) -> Iterator[Caption]:
        good = [(entries, [_ask(prompt or self.prompt)]) for _, entries in batch if not isinstance(entries, str)]
        texts = iter(self.generate(good, tuned=tuned, decoding=decoding) if good else [])
        for name, entries in batch:
            yield Caption(name, error=entries) if isinstance(entries, str) else Caption(name, text=next(texts)[0])

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
        steps = self._decode(encoded, [entry for entries, _ in asked for entry in entries], decoding)
        while True:
            # Entered for each step anew: whoever takes the tokens finds gradients and adapter as they were.
            with torch.inference_mode(), switch():
                step = next(steps, None)
            if step is None:
                return
            yield from step

    def _decode(
        self, encoded: Sequence[Encoded], images: Sequence[ImageFeatures], decoding: Decoding
    ) -> Iterator[list[tuple[int, int]]]:
        """The (row, token) pairs of each step."""
        backbone, device = self.backbone, self.backbone.device
        random = torch.Generator(device).manual_seed(decoding.seed)
        cache = backbone.new_cache()
        owner = torch.tensor([i for i, e in enumerate(encoded) for _ in e.branches], device=device)

        # 1. Every image's prefix, once. Without any (text only), branches start from nothing.
        mask = torch.zeros(len(owner), 0, dtype=torch.long, device=device)
        if any(len(e.prefix_ids) for e in encoded):
            ids, prefix_mask = _left_pad([e.prefix_ids for e in encoded], backbone.pad_token_id)
            positions = torch.zeros(3, *ids.shape, dtype=torch.long)
            for i, e in enumerate(encoded):
                positions[:, i, ids.shape[1] - len(e.prefix_ids) :] = e.prefix_positions
            features = torch.cat([entry.features for entry in images]).to(device) if images else None
            prefix_mask = prefix_mask.to(device)
            backbone.forward(ids.to(device), prefix_mask, positions.to(device), features, cache)
            cache.batch_select_indices(owner)
            mask = prefix_mask[owner]

        # 2. Every branch behind its image's keys and values.
        ids, branch_mask = _left_pad([b.input_ids for e in encoded for b in e.branches], backbone.pad_token_id)
        starts = [int(e.prefix_positions.max()) + 1 if len(e.prefix_ids) else 0 for e in encoded]
        start = torch.tensor(starts, device=device)[owner]
        branch_mask = branch_mask.to(device)
        mask = torch.cat([mask, branch_mask], dim=1)
        position = start[:, None] + (branch_mask.cumsum(1) - 1).clamp(min=0)
        hidden = backbone.forward(ids.to(device), mask, position.expand(3, -1, -1), None, cache)[:, -1]
        position = position[:, -1:]

        # 3. A token at a time, for the rows that go on.
        rows = torch.arange(len(owner), device=device)
        ends = torch.tensor(sorted(backbone.eos_token_ids), device=device)
        for step in range(decoding.max_new_tokens):
            token = _pick(backbone.logits(hidden).float(), decoding, random)
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


def _ask(question: str) -> tuple[Turn]:
    return (Turn(question, ""),)


def _named(image: ImageSource) -> tuple[str, ImageRef | Image.Image]:
    if isinstance(image, ImageRef):
        return image.name, image
    if isinstance(image, str | Path):
        return str(image), ImageRef(path=Path(image).expanduser().absolute(), name=str(image))
    return "image", load_image(image)


def _left_pad(sequences: Sequence[torch.Tensor], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(B, T)`` tokens with padding on the left, so that all end together, and their mask."""
    width = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), width), pad_token_id)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for i, sequence in enumerate(sequences):
        ids[i, width - len(sequence) :] = sequence
        mask[i, width - len(sequence) :] = 1
    return ids, mask


def _pick(logits: torch.Tensor, decoding: Decoding, random: torch.Generator) -> torch.Tensor:
    """The next token of each row, ``(B,)`` from ``(B, vocabulary)``."""
    if decoding.temperature == 0:
        return logits.argmax(-1)
    shares, tokens = (logits / decoding.temperature).softmax(-1).sort(-1, descending=True)
    before = shares.cumsum(-1) - shares
    shares = shares.masked_fill(before >= decoding.top_p, 0.0)  # nucleus sampling, arXiv:1904.09751
    return tokens.gather(-1, torch.multinomial(shares, 1, generator=random))[:, 0]
