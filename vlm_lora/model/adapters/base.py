"""What all methods share: the contract, the folder an adapter is kept in, and the attached `Adapter`.

An adapter folder holds ``adapter_config.json`` (the method and its settings), ``adapter_model.safetensors``
(its tensors) and ``contract.json``: what the adapter was trained on and with, so that loading it elsewhere
cannot go wrong in silence. LoRA's two files are PEFT's own. Those of the methods that PEFT does not have, or does not
have right for images, are ours: the settings are ``{"method": ..., "format": 1, ...}`` and the tensors are named
as they are in the model they sit in, such as
``model.language_model.layers.0.self_attn.o_proj.bottleneck.up.weight``.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch

from vlm_lora.config import HUB_NAME
from vlm_lora.data.readers.prompts import literal, variables_of
from vlm_lora.errors import AdapterError
from vlm_lora.model.backbone import Backbone
from vlm_lora.model.families import ADAPTED, PARTS, part_of
from vlm_lora.model.folder import from_hub, read_json
from vlm_lora.model.shapes import num_numbers

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
    variables: list = field(default_factory=list)
    """Of the prompt, as `data.readers.prompts` has them."""
    parent: str = ""
    """Name of the run that this one goes on from."""
    parent_fingerprint: str = ""
    """Hash of the tensors that it began with."""
    system: str = ""
    """The system prompt that its examples have in common; an earlier version's adapters have none."""

    @property
    def template(self) -> str:
        """The prompt to fill in; earlier versions knew no variables, and took every prompt as it is."""
        return self.prompt if self.variables else literal(self.prompt)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the model, its adapted modules, and its numbers of trained and frozen parameters."""

    name: str
    modules: int
    trained: int
    frozen: int


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter attached to a backbone.

    ``switched_off`` gives a context in which the model is the base model; ``write`` puts tensors and settings in a
    folder; ``read`` takes the tensors from one of the same method and sizes. ``contract`` is None
    for one that another tool wrote.
    """

    backbone: Backbone
    contract: Contract | None
    switched_off: Callable[[], AbstractContextManager]
    write: Callable[[Path], None]
    read: Callable[[Path], None]

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Names, as in the base model, and tensors of all that trains."""
        return [(n, p) for n, p in self.backbone.model.named_parameters() if p.requires_grad]

    def parts(self) -> list[Part]:
        """What trains and what is frozen, for the table a run starts with."""
        groups: dict[str, list[tuple[str, torch.nn.Parameter]]] = {part: [] for part in PARTS}
        for name, parameter in self.backbone.model.named_parameters():
            groups[part_of(name)].append((name, parameter))
        return [
            Part(
                group,
                len({ADAPTED.split(name)[0] for name, _ in members if ADAPTED.search(name)}),
                sum(_trained(p) for _, p in members),
                sum(num_numbers(p) - _trained(p) for _, p in members),
            )
            for group, members in groups.items()
        ]

    def going_on_from(self, run: str, folder: Path) -> "Adapter":
        """This one with the tensors of the adapter in ``folder``, its parent, of the name ``run``.

        Raises:
            AdapterError: it was made for another base, or is of another method or other sizes.
        """
        check_contract(self.backbone, folder)
        self.read(folder)
        fingerprint = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()[:16]
        assert self.contract is not None
        return replace(self, contract=replace(self.contract, parent=run, parent_fingerprint=fingerprint))

    @contextmanager
    def as_in(self, folder: Path) -> Iterator[None]:
        """Inside, it has the tensors of the adapter in ``folder``."""
        own = [(parameter, parameter.detach().clone()) for _, parameter in self.named_parameters()]
        self.read(folder)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, tensor in own:
                    parameter.copy_(tensor)

    def save(self, folder: Path) -> None:
        """Write the adapter folder. ``contract`` must be known."""
        folder.mkdir(parents=True, exist_ok=True)
        self.write(folder)
        shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors writes for the owner alone; engines read too
        if self.contract is not None:
            later = _later_fields()
            content = {
                k: v for k, v in asdict(self.contract).items() if v or k not in later
            }  # earlier versions read it
            write_json(content, folder / CONTRACT)


def _trained(parameter: torch.nn.Parameter) -> int:
    """How many of its numbers train: of PiSSA's tensors a half stays as it starts, and says so by ``num_trained``."""
    return getattr(parameter, "num_trained", parameter.numel()) if parameter.requires_grad else 0


def new_contract(backbone: Backbone, method: str, prompt: str, system: str = "") -> Contract:
    min_pixels, max_pixels = backbone.pixel_limits
    return Contract(
        base=backbone.name,
        base_fingerprint=backbone.base_fingerprint,
        tower_fingerprint=backbone.tower_fingerprint,
        method=method,
        prompt=prompt,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        dtype=str(backbone.dtype).removeprefix("torch."),
        variables=variables_of(prompt),
        system=system,
    )


# -- the folder ----------------------------------------------------------------------------------------------


def find_adapter(path: str | Path) -> Path:
    """The adapter folder in ``path``: itself, the ``adapter`` folder of a run, or a hub name's (downloaded if need be).

    Raises:
        AdapterError: there is none, or its weights are not safetensors.
    """
    given, name = Path(path).expanduser(), str(path).removeprefix("hf:")
    if not given.exists() and HUB_NAME.fullmatch(name):
        try:
            given = from_hub(name, [CONFIG, WEIGHTS, CONTRACT])
        except LookupError as error:
            raise AdapterError(
                f"--adapter {path}: there is no such folder, and {error}. Give a run folder, an adapter folder or the "
                "name of an adapter on the hub."
            ) from error
    for folder in (given, given / "adapter"):
        if (folder / CONFIG).is_file():
            if not (folder / WEIGHTS).is_file():
                # Checked here: PEFT would open a pickled adapter_model.bin in its place.
                raise AdapterError(f"--adapter {path}: {folder} holds no {WEIGHTS}; other formats are not read.")
            return folder
    what = "there is no such folder" if not given.exists() else f"it holds no {CONFIG} and no adapter/{CONFIG}"
    raise AdapterError(f"--adapter {path}: {what}. Give a run folder or an adapter folder.")


_read = partial(read_json, wrong=AdapterError, advice=" Train the adapter again, or copy it from where it is sound.")


def write_json(content: dict, file: Path) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_contract(folder: Path) -> Contract | None:
    """The contract of an adapter folder; None if another tool wrote the adapter."""
    file = folder / CONTRACT
    if not file.is_file():
        return None
    content = _read(file)
    content = _later_fields() | content
    types = {field.name: field.type for field in fields(Contract)}
    odd = [name for name in sorted(content.keys() | types.keys()) if type(content.get(name)) is not types.get(name)]
    if odd:
        raise AdapterError(f"{file}: is not a contract that vlm-lora wrote ({odd[0]} is {content.get(odd[0])!r}).")
    contract = Contract(**content)
    if contract.variables != variables_of(contract.template):
        raise AdapterError(f"{file}: its prompt has other variables than {', '.join(contract.variables)}.")
    return contract


def _later_fields() -> dict:
    """What a contract of an earlier version leaves out, with the values that hold there."""
    later = {f.name: f.default_factory() for f in fields(Contract) if f.default_factory is not MISSING}
    return later | {f.name: f.default for f in fields(Contract) if f.default is not MISSING}


def base_of(folder: Path) -> str:
    """The base model that an adapter folder names."""
    contract = read_contract(folder)
    base = contract.base if contract else read_settings(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise AdapterError(f"{folder / CONFIG}: names no base model; give --model.")
    return base


def read_settings(folder: Path) -> dict:
    """``adapter_config.json``."""
    return _read(folder / CONFIG)


def cannot_be_loaded(folder: Path, error: Exception) -> AdapterError:
    """The error to raise where a library gives up on a folder: its own words, in one line."""
    return AdapterError(f"{folder}: cannot be loaded: {' '.join(str(error).split())[:300]}")


def require_none(odd: Collection[str], folder: Path, backbone: Backbone) -> None:
    """Refuse tensors that an adapter has and the base has no place for, or the other way round."""
    if odd:
        raise AdapterError(
            f"{folder}: {len(odd)} of its tensors and the base model's do not match, first {min(odd)}. It was "
            f"made for another model than {backbone.name}."
        )


def check_contract(backbone: Backbone, folder: Path) -> Contract | None:
    """The folder's contract, once it is sure that the adapter was made for this base.

    Raises:
        AdapterError: it was made for another one.
    """
    contract = read_contract(folder)
    if contract and contract.base_fingerprint != backbone.base_fingerprint:
        alike = contract.base_fingerprint[:32] == backbone.base_fingerprint[:32]  # in the weights' names and shapes
        why = "the same sizes but other weights, as after a merge or more training" if alike else "other layers"
        raise AdapterError(
            f"{folder}: was trained on another base model ({contract.base}) than {backbone.name}, which has {why}. "
            "Give the base it was trained on with --model, or train a new adapter on this one."
        )
    if contract and (contract.min_pixels, contract.max_pixels) != backbone.pixel_limits:
        warnings.warn(
            f"The adapter was trained on images of {contract.min_pixels} to {contract.max_pixels} pixels, "
            f"and is used with {backbone.pixel_limits[0]} to {backbone.pixel_limits[1]}.",
            stacklevel=2,
        )
    return contract
