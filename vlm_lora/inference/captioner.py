"""Captions and answers from a base model, with or without an adapter. The public `Captioner`."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from PIL import Image

from vlm_lora.config import DEFAULT_MODEL, DEFAULT_PROMPT, cache_folder
from vlm_lora.data.example import Dialogue, ImageRef, Turn
from vlm_lora.data.readers.beside import prompt_for
from vlm_lora.data.readers.prompts import variables_of
from vlm_lora.errors import AdapterError, ConfigError, DataError
from vlm_lora.inference.caption import Caption, Decoding, ImageSource, name_of, source_of
from vlm_lora.inference.decode import MOST_ROWS, decode, rows_that_fit
from vlm_lora.model.adapters.base import Adapter, Contract, base_of, find_adapter, read_contract
from vlm_lora.model.adapters.methods import load_adapter
from vlm_lora.model.backbone import Backbone, load_backbone
from vlm_lora.model.boxes import Frame
from vlm_lora.model.device import is_out_of_memory
from vlm_lora.model.encode import Encoder
from vlm_lora.model.features import FeatureCache, ImageEntry
from vlm_lora.model.folder import find_model

WINDOW = 4
"""Images whose sizes differ are gathered for this many batches, and batched by length."""
EVEN = 1.25
"""Sizes that cost less padding than this factor do not differ."""

Request = Dialogue
"""A conversation, of which the last turn is to be answered."""


class Captioner:
    """A base model, with an adapter or without, that captions images and answers questions about them.

    >>> captioner = Captioner.load(adapter="runs/photos")
    >>> captioner.answer("cat.jpg", "What colour is the cat?")
    >>> for caption in captioner.caption(Path("photos").glob("*.jpg")): print(caption.image, caption.text)

    An image is a path, the bytes of an image file, a PIL image, or an `ImageRef`. ``tuned=False`` switches the adapter
    off: then the base answers.

    Attributes:
        prompt: the instruction for captions; by default the one that the adapter was trained with.
        system: the system message; empty for none.
    """

    def __init__(
        self, backbone: Backbone, adapter: Adapter | None, features: FeatureCache, prompt: str, system: str = ""
    ):
        self.backbone = backbone
        self.adapter = adapter
        self.features = features
        self.prompt = prompt
        self.system = system
        self.encoder = Encoder(backbone)
        self.load_in_4bit = False
        """Whether adapters that were trained on the base's own weights are to answer on a base in four bits."""
        self.while_training = False
        """Whether the base trains between two answers. What FSDP2 keeps of a pass then serves a backward pass too, and
        another thread is at work with the device."""
        self._base: Captioner | None = None  # of one that shares another's base

    def __repr__(self) -> str:
        contract = self.adapter.contract if self.adapter else None
        how = f"{contract.method} adapter on {contract.base}" if contract else "an adapter" if self.tuned else "a base"
        return f"<Captioner: {how}, prompt {self.prompt!r}>"

    @classmethod
    def load(  # arguments: what a user may choose, as on the command line
        cls,
        model: str | None = None,
        adapter: str | Path | None = None,
        *,
        prompt: str | None = None,
        system: str | None = None,
        dtype: str = "auto",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        load_in_4bit: bool = False,
    ) -> "Captioner":
        """Load base and adapter, on a GPU if there is one.

        Args:
            model: hub name, folder or ``tiny``; by default the base that the adapter names.
            adapter: run folder, adapter folder or hub name; None for the base alone.
            prompt: the instruction for captions; by default the one that the adapter, or a merged model, was trained
                with. The same holds for ``system`` and the pixel limits.
            system: the system message.
            dtype: the number format of the base: "float32", "bfloat16", "float16", or "auto": on a GPU bfloat16, or
                float16 where it has no bfloat16; else float32.
            min_pixels, max_pixels: the smallest and largest area of an image, in pixels; others are resized.
            load_in_4bit: keep the base's language layers in NF4 (arXiv:2305.14314), a quarter of their memory. Adapters
                of ``--method qlora`` always are on such a base; the answers of others change a little.

        Raises:
            ModelError: the base is not there, damaged, or of another family.
            AdapterError: the adapter is not there, damaged, or made for another base.
        """
        how = {"dtype": dtype, "min_pixels": min_pixels, "max_pixels": max_pixels, "load_in_4bit": load_in_4bit}
        return cls.load_several(model, [adapter], prompt=prompt, system=system, **how)[0]

    @classmethod
    def load_several(  # arguments: those of load
        cls,
        model: str | None,
        adapters: Sequence[str | Path | None],
        *,
        prompt: str | None = None,
        system: str | None = None,
        dtype: str = "auto",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        load_in_4bit: bool = False,
    ) -> list["Captioner"]:
        """A captioner for each adapter (None: the base alone), over one copy of the base's weights.

        Each sees images within its own pixel limits; the base sees them within the first adapter's. Arguments as for
        `load`.

        Raises:
            AdapterError: as for `load`; or adapters of QLoRA and others are mixed, and ``load_in_4bit`` is not given.
        """
        folders = [None if adapter is None else find_adapter(adapter) for adapter in adapters]
        given = [folder for folder in folders if folder]
        contracts = {folder: read_contract(folder) for folder in given}
        in_four_bits = [folder for folder in given if _in_four_bits(contracts[folder])]
        others = [folder for folder in given if folder not in in_four_bits]
        if in_four_bits and others and not load_in_4bit:
            raise AdapterError(
                f"{in_four_bits[0]} was trained by --method qlora, on a base in four bits, and {others[0]} was not: "
                "they cannot share one base. Give them in commands of their own, or --load-in-4bit to have both on one."
            )
        name = model or (base_of(given[0]) if given else DEFAULT_MODEL)
        first = next(filter(None, contracts.values()), None) or (None if given else read_contract(find_model(name)))
        backbone = load_backbone(
            name,
            dtype=dtype,
            min_pixels=min_pixels or (first.min_pixels if first else None),
            max_pixels=max_pixels or (first.max_pixels if first else None),
            quantise=load_in_4bit or bool(in_four_bits),
        )
        # Read from the disk cache, but do not fill it: most folders are captioned once.
        features = FeatureCache(backbone, cache_folder(), write=False, several=True)
        asked = prompt or (first.template if first else DEFAULT_PROMPT)
        base = cls(backbone, None, features, asked, _system(system, first))
        base.load_in_4bit = load_in_4bit
        limits = (min_pixels, max_pixels)
        return [base._tuned(folder, prompt, system, *limits) if folder else base for folder in folders]

    @property
    def base(self) -> "Captioner | None":
        """The captioner of the base alone; None if this captioner was made without one."""
        return self if self.adapter is None else self._base

    def with_adapter(self, adapter: str | Path, *, prompt: str | None = None, system: str | None = None) -> "Captioner":
        """The same base with another adapter, and the prompt and pixel limits of that. The base's weights are shared.

        Raises:
            AdapterError: the adapter was made for another base, or cannot be read.
        """
        if self.base is None:
            raise ConfigError("This captioner has no base of its own to share; use one that Captioner.load gave.")
        return self.base._tuned(find_adapter(adapter), prompt, system)

    def caption(
        self,
        images: ImageSource | Iterable[ImageSource],
        prompt: str | None = None,
        *,
        tuned: bool = True,
        batch_size: int | None = None,
        decoding: Decoding | None = None,
    ) -> Iterator[Caption]:
        """Caption images, in order. An image that cannot be used gets an error in its `Caption`, and stops nothing.

        Args:
            images: one image or several; a generator is read a few batches ahead.
            prompt: the instruction, with variables such as ``{tags}`` or without; by default the captioner's.
            tuned: with False the base alone answers.
            batch_size: images decoded together; by default as many as fit into memory, up to 32.
            decoding: by default greedy.

        Raises:
            ConfigError: ``batch_size`` is less than 1.
        """
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; expected 1 or more images, or None for what fits.")
        images = [images] if isinstance(images, ImageSource) else images
        decoding = decoding or Decoding()
        prompt = prompt or self.prompt
        window: list[tuple[str, ImageEntry | str, Request]] = []
        for image in images:
            try:
                request = self._ask(prompt, source := source_of(image))
                window.append((name_of(image), self.features.look(source), request))
            except DataError as error:
                window.append((name_of(image), str(error), Dialogue(())))
            sizes = [len(entry.values) for _, entry, _ in window if not isinstance(entry, str)]
            fit = batch_size or (rows_that_fit(self.backbone, max(sizes), decoding) if sizes else MOST_ROWS)
            even = len(sizes) * max(sizes, default=0) <= EVEN * sum(sizes)
            if len(window) >= (fit if even else WINDOW * fit):
                yield from self._caption_window(window, tuned, batch_size, decoding)
                window = []
        yield from self._caption_window(window, tuned, batch_size, decoding)

    def answer(
        self,
        image: ImageSource,
        question: str | Sequence[str],
        *,
        tuned: bool = True,
        decoding: Decoding | None = None,
    ) -> str | list[str]:
        """The answer to a question about an image; for a list of questions the list of answers.

        Several questions about an image are answered together, for little more than the time of one.

        Raises:
            DataError: the image cannot be used.
        """
        questions = [question] if isinstance(question, str) else list(question)
        if not questions:
            return []
        entries = self.features.get([source_of(image)])
        (answers,) = self.generate([(entries, [self._ask(q) for q in questions])], tuned=tuned, decoding=decoding)
        return answers[0] if isinstance(question, str) else answers

    def stream(
        self, image: ImageSource, request: str | None = None, *, tuned: bool = True, decoding: Decoding | None = None
    ) -> Iterator[str]:
        """The answer to ``request``, or to the prompt, as it grows: the whole text so far, after each token.

        Raises:
            DataError: the image cannot be used, or has no value for a variable of the request.
        """
        source, decoding = source_of(image), decoding or Decoding()
        asked = self._ask(request or self.prompt, source)
        entries = self.features.get([source])
        begun = list(self.encoder.tokenize(decoding.begin_with))
        tokens: list[int] = []
        for _, token in self._tokens([(entries, [asked])], tuned, decoding):
            tokens.append(token)
            yield self.encoder.decode(begun + tokens)
        yield self._text(tokens, decoding)

    def generate(
        self,
        asked: Sequence[tuple[Sequence[ImageEntry], Sequence[Request]]],
        *,
        tuned: bool = True,
        decoding: Decoding | None = None,
    ) -> list[list[str]]:
        """Answers to several requests about each of several (lists of) images, decoded as one batch.

        An answer that misses what ``decoding`` requires is returned as it is; only `caption` samples again.

        Args:
            asked: pairs of the features of the images, from ``features.get``, and the conversations about them, of each
                of which the last turn is to be answered.
        """
        decoding = decoding or Decoding()
        rows: list[list[int]] = [[] for _, requests in asked for _ in requests]
        for row, token in self._tokens(asked, tuned, decoding):
            rows[row].append(token)
        texts = iter([self._text(tokens, decoding) for tokens in rows])
        return [[next(texts) for _ in requests] for _, requests in asked]

    @property
    def tuned(self) -> bool:
        """Whether there is an adapter."""
        return self.adapter is not None

    @property
    def quantised(self) -> bool:
        """Whether the base is in four bits."""
        return self.backbone.quantised

    def respond(
        self,
        asked: Sequence[tuple[Sequence[ImageSource], Sequence[Request]]],
        *,
        tuned: bool = True,
        decoding: Decoding | None = None,
    ) -> list[list[str] | DataError]:
        """As `generate`, but from images. For images that cannot be used, the error takes the place of the answers."""
        entries: list[list[ImageEntry] | DataError] = []
        for images, _ in asked:
            try:
                entries.append(self.features.get([source_of(image) for image in images]))
            except DataError as error:
                entries.append(error)
        usable = [
            (e, requests) for e, (_, requests) in zip(entries, asked, strict=True) if not isinstance(e, DataError)
        ]
        answers = iter(self.generate(usable, tuned=tuned, decoding=decoding) if usable else ())
        return [entry if isinstance(entry, DataError) else next(answers) for entry in entries]

    def read(self, dialogue: Dialogue) -> Dialogue:
        """The dialogue as the model reads it: names and boxes in place of their marks, in the model's coordinates."""
        return self.encoder.read(dialogue)

    def frame(self, width: int, height: int) -> Frame:
        """Where a picture of this size, in pixels, lies in the coordinates that the model gives boxes in."""
        return self.backbone.frame(width, height)

    # -- inside --------------------------------------------------------------------------------------------------

    def _ask(self, question: str, image: ImageRef | Image.Image | None = None) -> Request:
        """What is asked; of a prompt, its variables are filled in for the image.

        Raises DataError where it has no value for one.
        """
        asked = question if image is None else prompt_for(question, image)
        return Dialogue((Turn(asked, ""),), system=self.system)

    def _tuned(
        self,
        folder: Path,
        prompt: str | None = None,
        system: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> "Captioner":
        """The adapter in ``folder`` on this base. What is not given is what the adapter was trained with."""
        contract = read_contract(folder)
        if self.backbone.quantised and not (self.load_in_4bit or _in_four_bits(contract)):
            raise AdapterError(f"{folder}: was not trained by --method qlora; the base is loaded in four bits.")
        least, most = (contract.min_pixels, contract.max_pixels) if contract else self.backbone.pixel_limits
        limits = (min_pixels or least, max_pixels or most)
        backbone = self.backbone.twin(*limits)
        adapter = load_adapter(backbone, folder)
        same = limits == self.backbone.pixel_limits and not backbone.tower_adapted
        features = self.features if same else FeatureCache(backbone, cache_folder(), write=False, several=True)
        trained = contract.template if contract else DEFAULT_PROMPT
        if prompt and contract and variables_of(prompt) != contract.variables:
            warnings.warn(
                f"{folder} was trained with the prompt {trained!r}; {prompt!r} has other variables.", stacklevel=2
            )
        prompt = prompt or trained
        captioner = Captioner(backbone, adapter, features, prompt, _system(system, contract))
        captioner._base = self
        return captioner

    def _caption_window(
        self,
        window: Sequence[tuple[str, ImageEntry | str, Request]],
        tuned: bool,
        batch_size: int | None,
        decoding: Decoding,
    ) -> Iterator[Caption]:
        """Captions of the window's images, in order, from batches of images of like size."""
        images = {i: entry for i, (_, entry, _) in enumerate(window) if not isinstance(entry, str)}
        order = sorted(images, key=lambda i: -len(images[i].values))
        texts: dict[int, str] = {}
        for attempt in range(1 + decoding.attempts):
            how = decoding.again(attempt) if attempt else decoding
            left = order
            while left:
                rows = batch_size or rows_that_fit(self.backbone, len(images[left[0]].values), how)
                batch, left = left[:rows], left[rows:]
                images |= zip(batch, self.features.compute([images[i] for i in batch]), strict=True)
                answers = self._within_memory([([images[i]], [window[i][2]]) for i in batch], tuned, how)
                texts |= {i: text for i, (text,) in zip(batch, answers, strict=True)}
            order = [i for i in order if decoding.missed(texts[i])]
        for i, (name, entry, _) in enumerate(window):
            if isinstance(entry, str):
                yield Caption(name, error=entry)
            elif missed := decoding.missed(texts[i]):
                yield Caption(name, error=decoding.missed_by(texts[i], missed))
            else:
                yield Caption(name, text=texts[i])

    def _text(self, tokens: Sequence[int], decoding: Decoding) -> str:
        """The answer from the tokens that were decoded."""
        text = self.encoder.decode([*self.encoder.tokenize(decoding.begin_with), *tokens])
        return decoding.finished(text, cut=len(tokens) == decoding.max_new_tokens)

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

    def _tokens(
        self, asked: Sequence[tuple[Sequence[ImageEntry], Sequence[Request]]], tuned: bool, decoding: Decoding
    ) -> Iterator[tuple[int, int]]:
        """(row, token) as they are decoded, a row for each request in order, without the tokens that end an answer,
        and those that `Decoding.begin_with` has it begin with."""

        def switch() -> AbstractContextManager:
            return self.adapter.switched_off() if self.adapter and not tuned else nullcontext()

        encoded, images = [], []
        with switch():  # a trained prompt is part of the tokens
            for entries, requests in asked:
                grids = [entry.grid_thw for entry in entries]
                grid = torch.stack(grids) if grids else torch.zeros(0, 3, dtype=torch.long)
                encoded += (new := self.encoder.encode_requests(requests, grid, decoding.begin_with))
                images += [entries] * len(new)
            begun = self.encoder.tokenize(decoding.begin_with)
        steps = decode(self.backbone, encoded, images, decoding, begun, recorded=not self.while_training)
        without_gradients = torch.no_grad if self.while_training else torch.inference_mode
        while True:
            # Entered for each step anew: whoever takes the tokens finds gradients and adapter as they were.
            with without_gradients(), switch():
                step = next(steps, None)
            if step is None:
                return
            yield from step


def _in_four_bits(contract: Contract | None) -> bool:
    """Whether the base is to be quantised: QLoRA's adapters hold for that base alone."""
    return contract is not None and contract.method == "qlora"


def _system(given: str | None, contract: Contract | None) -> str:
    return given if given is not None else contract.system if contract else ""
