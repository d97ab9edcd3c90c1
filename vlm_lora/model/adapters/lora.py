"""LoRA (arXiv:2106.09685) on every linear of the language layers and on the merger's two, as a plain PEFT adapter.

An adapter folder is what PEFT writes (``adapter_config.json``, ``adapter_model.safetensors``; plain PEFT loads it), with
``contract.json`` beside it: what the adapter was trained on and with, so that loading it elsewhere cannot go wrong
in silence.
"""

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from vlm_lora.errors import AdapterError
from vlm_lora.model.backbone import LANGUAGE_LINEARS, MERGER_LINEARS, TOWER_PREFIXES, Backbone

WEIGHTS, CONFIG, CONTRACT = "adapter_model.safetensors", "adapter_config.json", "contract.json"


@dataclass(frozen=True, slots=True)
class Contract:
    """What an adapter takes for granted: the base it was trained on, and what that base was shown."""

    base: str
    base_fingerprint: str
    tower_fingerprint: str
    method: str
    prompt: str
    min_pixels: int
    max_pixels: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the model, its LoRA modules, and its numbers of trained and frozen parameters."""

    name: str
    modules: int
    trained: int
    frozen: int


class Adapter:
    """An adapter attached to a backbone."""

    def __init__(self, backbone: Backbone, peft_model: PeftModel, contract: Contract | None):
        self.backbone = backbone
        self.peft_model = peft_model
        self.contract = contract

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Names, as in the base model, and tensors of all that trains."""
        return [(n, p) for n, p in self.backbone.model.named_parameters() if p.requires_grad]

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Inside, the model is the base model."""
        with self.peft_model.disable_adapter():
            yield

    def parts(self) -> list[Part]:
        """What trains and what is frozen, for the table a run starts with."""
        groups = {"vision tower": [], "merger (projector)": [], "language layers": [], "embeddings and head": []}
        for name, parameter in self.backbone.model.named_parameters():
            if name.startswith(TOWER_PREFIXES):
                group = "vision tower"
            elif name.startswith("model.visual."):
                group = "merger (projector)"
            elif name.startswith("model.language_model.layers."):
                group = "language layers"
            else:
                group = "embeddings and head"
            groups[group].append((name, parameter))
        return [
            Part(
                group,
                sum(".lora_A." in name for name, _ in members),
                sum(p.numel() for _, p in members if p.requires_grad),
                sum(p.numel() for _, p in members if not p.requires_grad),
            )
            for group, members in groups.items()
        ]

    def save(self, folder: Path) -> None:
        """Write the adapter folder. ``contract`` must be known."""
        folder.mkdir(parents=True, exist_ok=True)
        # "auto" would ask the hub whether the vocabulary has changed; embeddings are never trained here.
        self.peft_model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
        if self.contract is not None:
            text = json.dumps(asdict(self.contract), indent=2, ensure_ascii=False)
            (folder / CONTRACT).write_text(text + "\n", encoding="utf-8")


def attach_lora(
    backbone: Backbone, *, rank: int, alpha: float, dropout: float, seed: int, prompt: str
) -> Adapter:
    """Freeze the base and add LoRA; the tensors' first values come from ``seed``.

    Raises:
        AdapterError: a part of the vision tower would train, or the language layers or the merger were not found.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=f"(?:{LANGUAGE_LINEARS})|(?:{MERGER_LINEARS})",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for an attribute by its old name
        torch.manual_seed(seed)
        peft_model = get_peft_model(backbone.model, config)
    # The name the user knows it by, which may be the hub's, and not the folder it happened to be loaded from.
    peft_model.peft_config["default"].base_model_name_or_path = backbone.name
    min_pixels, max_pixels = backbone.pixel_limits
    contract = Contract(
        base=backbone.name,
        base_fingerprint=backbone.language_fingerprint,
        tower_fingerprint=backbone.tower_fingerprint,
        method="lora",
        prompt=prompt,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        dtype=str(backbone.dtype).removeprefix("torch."),
    )
    adapter = Adapter(backbone, peft_model, contract)
    check_trained(adapter)
    return adapter


def check_trained(adapter: Adapter) -> None:
    """Raises `AdapterError` unless LoRA sits in language layers and merger, and nothing else trains."""
    trained = [name for name, _ in adapter.named_parameters()]
    strays = [name for name in trained if name.startswith(TOWER_PREFIXES) or ".lora_" not in name]
    if strays:
        raise AdapterError(f"{len(strays)} tensors would train that must not, first {strays[0]}.")
    for part, pattern in (("language layers", LANGUAGE_LINEARS), ("merger", MERGER_LINEARS)):
        if not any(re.match(pattern, name) for name in trained):
            raise AdapterError(
                f"No linear layer of the {part} was found to adapt in {adapter.backbone.name}: nothing there would be "
                "learnt. This is not a checkpoint layout that vlm-lora knows."
            )


def find_adapter(path: str | Path) -> Path:
    """The adapter folder in ``path``: itself, or the ``adapter`` folder of a run.

    Raises:
        AdapterError: there is none, or its weights are not safetensors.
    """
    given = Path(path).expanduser()
    for folder in (given, given / "adapter"):
        if (folder / CONFIG).is_file():
            if not (folder / WEIGHTS).is_file():
                # Checked here: PEFT would open a pickled adapter_model.bin in its place.
                raise AdapterError(f"--adapter {path}: {folder} holds no {WEIGHTS}; other formats are not read.")
            return folder
    what = "there is no such folder" if not given.exists() else f"it holds no {CONFIG} and no adapter/{CONFIG}"
    raise AdapterError(f"--adapter {path}: {what}. Give a run folder or an adapter folder.")


def read_contract(folder: Path) -> Contract | None:
    """The contract of an adapter folder; None if another tool wrote the adapter."""
    file = folder / CONTRACT
    if not file.is_file():
        return None
    try:
        return Contract(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{file}: is not a contract that vlm-lora wrote ({error}).") from error


def base_of(folder: Path) -> str:
    """The base model that an adapter folder names."""
    contract = read_contract(folder)
    if contract:
        return contract.base
    base = _read_config(folder).get("base_model_name_or_path")
    if not base:
        raise AdapterError(f"{folder / CONFIG}: names no base model; give --model.")
    return base


def load_adapter(backbone: Backbone, folder: Path) -> Adapter:
    """Attach a saved adapter, ready for inference.

    Raises:
        AdapterError: not a LoRA adapter, made for another base, or any key is without its counterpart.
    """
    config = _read_config(folder)
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder / CONFIG}: peft_type is {config.get('peft_type')!r}; expected 'LORA'.")
    if config.get("megatron_config"):
        raise AdapterError(f"{folder / CONFIG}: asks for a module to be imported (megatron_config); refused.")
    contract = read_contract(folder)
    if contract and contract.base_fingerprint != backbone.language_fingerprint:
        raise AdapterError(
            f"{folder}: was trained on another base model ({contract.base}) than {backbone.name}. Give that base with "
            "--model, or train a new adapter on this one."
        )
    if contract and (contract.min_pixels, contract.max_pixels) != backbone.pixel_limits:
        warnings.warn(
            f"The adapter was trained on images of {contract.min_pixels} to {contract.max_pixels} pixels, and is used "
            f"with {backbone.pixel_limits[0]} to {backbone.pixel_limits[1]}.",
            stacklevel=2,
        )
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            saved = set(weights.keys())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT only warns of unmatched keys; they are an error below
            peft_model = PeftModel.from_pretrained(backbone.model, str(folder), is_trainable=False)
    except (SafetensorError, RuntimeError, ValueError, TypeError) as error:
        raise AdapterError(f"{folder}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    expected = set(get_peft_model_state_dict(peft_model, save_embedding_layers=False))
    if saved != expected:
        odd = sorted(saved ^ expected)
        raise AdapterError(
            f"{folder}: {len(odd)} of its tensors and the base model's do not match, first {odd[0]}. It was made for "
            f"another model than {backbone.name}."
        )
    peft_model.eval()
    return Adapter(backbone, peft_model, contract)


def _read_config(folder: Path) -> dict:
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder / CONFIG}: cannot be read ({error}).") from error
