"""From a method's name to an adapter attached, and from an adapter folder to one loaded.

LoRA and QLoRA are PEFT's (`lora`). Of the others each is a function that puts modules of its own into the model:
whatever trains then is saved, and ``on`` of each module switches it off.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vlm_lora.config import TrainConfig
from vlm_lora.errors import AdapterError
from vlm_lora.model.adapters.base import (
    CONFIG,
    WEIGHTS,
    Adapter,
    Contract,
    cannot_be_loaded,
    check_contract,
    new_contract,
    read_settings,
    require_none,
    write_json,
)
from vlm_lora.model.adapters.bottleneck import add_bottlenecks
from vlm_lora.model.adapters.lora import attach_lora, load_lora
from vlm_lora.model.adapters.prefix import add_prefix
from vlm_lora.model.adapters.prompt import add_prompt
from vlm_lora.model.backbone import Backbone

FORMAT = 1
"""Of the folders of the methods that are ours."""

OWN: dict[str, tuple[str, Callable[[Backbone, int, int], list[Any]]]] = {
    "adapter": ("bottleneck", add_bottlenecks),
    "prefix": ("num_virtual_tokens", add_prefix),
    "prompt": ("num_virtual_tokens", add_prompt),
}
"""By the ``method`` in ``adapter_config.json``, where PEFT's own files name none: the name of its size there and in
`TrainConfig`, and what adds it to the model, of that size and from a seed."""


def attach_adapter(backbone: Backbone, config: TrainConfig) -> Adapter:
    """A new adapter of ``config.method``, ready to be trained; everything else is frozen."""
    # Of the base alone, before anything sits in it
    contract = new_contract(backbone, config.method, config.prompt, config.system or "")
    if config.method not in OWN:
        return attach_lora(backbone, config, contract)
    size_name, _ = OWN[config.method]
    return _attach_own(backbone, config.method, getattr(config, size_name), config.seed, contract)


def load_adapter(backbone: Backbone, folder: Path) -> Adapter:
    """A saved adapter attached, ready for inference.

    Raises:
        AdapterError: of a method unknown here, made for another base, or any key is without its counterpart.
    """
    settings = read_settings(folder)
    method = settings.get("method")
    if method is None:
        return load_lora(backbone, folder)
    if not isinstance(method, str) or method not in OWN:
        known = ", ".join(["lora", *OWN])
        raise AdapterError(f"{folder / CONFIG}: method is {method!r}; known here are {known}.")
    size_name, _ = OWN[method]
    size = settings.get(size_name)
    if settings.get("format") != FORMAT or type(size) is not int or size < 1:
        raise AdapterError(
            f"{folder / CONFIG}: format {settings.get('format')!r}, {size_name} {size!r}; expected format "
            f"{FORMAT} and a number from 1 on."
        )
    adapter = _attach_own(backbone, method, size, 0, check_contract(backbone, folder))
    adapter.read(folder)
    for _, parameter in adapter.named_parameters():
        parameter.requires_grad_(False)
    return adapter


def _attach_own(backbone: Backbone, method: str, size: int, seed: int, contract: Contract | None) -> Adapter:
    size_name, add = OWN[method]
    backbone.model.requires_grad_(False)
    added = add(backbone, size, seed)
    saved = {name: parameter for name, parameter in backbone.model.named_parameters() if parameter.requires_grad}

    @contextmanager
    def switched_off() -> Iterator[None]:
        for module in added:
            module.on = False
        try:
            yield
        finally:
            for module in added:
                module.on = True

    def write(folder: Path) -> None:
        save_file({name: p.detach().contiguous().cpu() for name, p in saved.items()}, folder / WEIGHTS)
        write_json({"format": FORMAT, "method": method, size_name: size}, folder / CONFIG)

    return Adapter(backbone, contract, switched_off, write, lambda folder: _fill(backbone, saved, folder))


@torch.no_grad()
def _fill(backbone: Backbone, parameters: dict[str, torch.nn.Parameter], folder: Path) -> None:
    """Fill the parameters of an attached adapter from its folder; none may be left over."""
    try:
        saved = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise cannot_be_loaded(folder, error) from error
    alike = {name for name in saved.keys() & parameters.keys() if saved[name].shape == parameters[name].shape}
    require_none((saved.keys() | parameters.keys()) - alike, folder, backbone)
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])
