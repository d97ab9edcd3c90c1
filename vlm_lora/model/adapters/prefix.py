"""Prefix tuning (arXiv:2101.00190): in every language layer, trained keys and values that all tokens see.

They stand where ``num_virtual_tokens`` tokens before the sequence would have left them: the keys are taken as
already rotated to positions 0, 1, ..., and the sequence's own positions begin behind. At the start they are
the ones that words drawn from the vocabulary leave there; the paper's reparametrisation through an MLP is
left out. Saved are ``model.language_model.prefix.keys`` and ``.values``, both ``(layers, key_value_heads,
num_virtual_tokens, head_dim)``; the settings are ``{"method": "prefix", "num_virtual_tokens": ...}``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from vlm_lora.model.adapters.base import (
    Adapter,
    Contract,
    check_contract,
    new_contract,
    read_settings,
    read_tensors,
    size_in,
    write_tensors,
)
from vlm_lora.model.adapters.prompt import some_words
from vlm_lora.model.backbone import Backbone


class Prefix(nn.Module):
    """``keys`` and ``values``, each ``(layers, key_value_heads, count, head_dim)``; in float32 or better."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        precise = torch.promote_types(keys.dtype, torch.float32)
        self.keys = nn.Parameter(keys.detach().to(precise, copy=True))
        self.values = nn.Parameter(values.detach().to(precise, copy=True))


def attach_prefix(backbone: Backbone, *, count: int, seed: int, prompt: str) -> Adapter:
    """Freeze the base and give each language layer ``count`` trained pairs; the first values come from
    ``seed``.
    """
    keys, values = pairs_of(backbone, some_words(backbone, count, seed))
    return _attach(backbone, Prefix(keys, values), new_contract(backbone, "prefix", prompt))


@torch.no_grad()
def pairs_of(backbone: Backbone, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that ``words`` leave in every layer when a sequence begins with them."""
    cache = backbone.new_cache()
    positions = torch.arange(len(words), device=backbone.device).expand(3, 1, -1)
    backbone.forward(words[None], torch.ones_like(words)[None], positions, None, cache)
    keys = torch.cat([layer.keys for layer in cache.layers])
    return keys, torch.cat([layer.values for layer in cache.layers])


def load_prefix(backbone: Backbone, folder: Path) -> Adapter:
    """Attach a saved prefix, ready for inference.

    Raises:
        AdapterError: made for another base, or any key is without its counterpart.
    """
    count = size_in(read_settings(folder), "num_virtual_tokens", folder)
    contract = check_contract(backbone, folder)
    keys, values = pairs_of(backbone, torch.zeros(count, dtype=torch.long, device=backbone.device))
    adapter = _attach(backbone, Prefix(keys, values), contract)
    read_tensors(dict(adapter.named_parameters()), folder, backbone.name)
    return adapter


def _attach(backbone: Backbone, prefix: Prefix, contract: Contract | None) -> Adapter:
    backbone.model.requires_grad_(False)
    backbone.prefix = backbone.language_model.prefix = prefix
    saved = {n: p for n, p in backbone.model.named_parameters() if p.requires_grad}
    count = prefix.keys.shape[2]

    @contextmanager
    def disable() -> Iterator[None]:
        backbone.prefix = None
        try:
            yield
        finally:
            backbone.prefix = prefix

    def write(folder: Path) -> None:
        write_tensors(saved, {"method": "prefix", "num_virtual_tokens": count}, folder)

    return Adapter(backbone, contract, disable, write)
