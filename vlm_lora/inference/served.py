"""What a served model was trained with: to ask it as it was trained, and to see that the server shows it the same."""

import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from vlm_lora.data.example import Dialogue
from vlm_lora.errors import AdapterError, ConfigError
from vlm_lora.model.adapters.base import CONTRACT, Contract, find_adapter, read_contract, read_settings
from vlm_lora.model.encode import Encoder
from vlm_lora.model.preprocess import Preprocessor, load_preprocessor

SCALED_ALIKE = "scales all its layers alike, and this adapter has a rank or an alpha of its own for some"
ON_THE_BASE = {
    "use_dora": "serves no DoRA",
    "alpha_pattern": SCALED_ALIKE,
    "rank_pattern": SCALED_ALIKE,
}
"""Settings of PEFT with which an engine that puts the adapter on its base says something else, and why."""


class Trained:
    """The prompt, the pixel limits and the tokens of an adapter, or of the checkpoint it was merged into.

    It holds no weights: the base's processor and tokenizer are enough.
    """

    def __init__(self, contract: Contract, preprocessor: Preprocessor, settings: dict):
        self.prompt = contract.template
        self.system = contract.system
        self.method = contract.method
        self.preprocessor = preprocessor
        self.encoder = Encoder(preprocessor)
        self._settings = settings
        self._one_at_a_time = threading.Lock()  # a tokenizer is switched between special tokens as such and as text

    @classmethod
    def load(cls, adapter: str | Path) -> "Trained":
        """From a run folder, an adapter folder, a hub name or a merged checkpoint.

        Raises:
            AdapterError: another tool made it, so nobody knows what it was trained with.
            ConfigError: it was trained by a method that no engine serves.
        """
        folder = Path(adapter).expanduser()
        merged = (folder / "config.json").is_file()
        folder = folder if merged else find_adapter(adapter)
        contract = read_contract(folder)
        if contract is None:
            raise AdapterError(f"--adapter {adapter}: holds no {CONTRACT}, so what it was trained with is not known.")
        if contract.method not in ("lora", "qlora"):
            raise ConfigError(f"--adapter {adapter}: what --method {contract.method} trains is served by no engine.")
        limits = {"min_pixels": contract.min_pixels, "max_pixels": contract.max_pixels}
        preprocessor = load_preprocessor(str(folder) if merged else contract.base, **limits)
        return cls(contract, preprocessor, {} if merged else read_settings(folder))

    @property
    def limits(self) -> str:
        return "{:,} to {:,} pixels".format(*self.preprocessor.pixel_limits)

    def require_served_on_base(self, model: str) -> None:
        """Raise `ConfigError` if an engine that puts the adapter on its base cannot say what it says."""
        why = next((why for setting, why in ON_THE_BASE.items() if self._settings.get(setting)), None)
        if self.method == "qlora":
            why = "has the whole base, and this adapter was trained on one in four bits"
        if why:
            raise ConfigError(
                f"--model {model}: the server puts the adapter on its base, and {why}. Serve what `vlm-lora merge` "
                "writes."
            )

    def require_plain(self, text: str) -> None:
        """Raise `ConfigError` for a text in which a server would find marks of the conversation, where there are
        none: ``<|im_end|>`` in a question ends it there, and here it is text as any other."""
        tokenizer = self.encoder.tokenizer
        mark = next((mark for mark in tokenizer.get_added_vocab() if mark in text), None)
        if mark:
            raise ConfigError(f"{text[:80]!r} holds {mark}, which a server takes for a mark of its own. Leave it out.")

    def shown(self, image: Image.Image) -> Image.Image:
        """The image in the size the model was trained to see it in: llama.cpp for one resizes in a way of its own."""
        return self.preprocessor.resized(image)

    def tokens(self, images: Sequence[Image.Image], request: Dialogue) -> int:
        """How many tokens a request is: a conversation about images as `shown`, whose last turn is to be answered."""
        grids = [self.preprocessor.grid(*image.size) for image in images]
        grid = torch.tensor(grids).reshape(-1, 3)
        with self._one_at_a_time:
            return self.encoder.encode_requests([request], grid)[0].num_tokens
