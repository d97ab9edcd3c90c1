"""Prefix tuning (arXiv:2101.00190): in every language layer, trained keys and values that all tokens see.

They stand where ``num_virtual_tokens`` tokens before the sequence would have left them: the keys are taken as
already rotated to positions 0, 1, ..., and the sequence's own positions begin after them. At the start they are
the ones that words drawn from the vocabulary leave there; the paper's reparametrisation through an MLP is
left out. Saved are ``model.language_model.prefix.keys`` and ``.values``, both ``(layers, key_value_heads,
num_virtual_tokens, head_dim)``; the settings are ``{"method": "prefix", "num_virtual_tokens": ...}``.
"""

import torch
from torch import nn

from vlm_lora.errors import AdapterError
from vlm_lora.model.adapters.prompt import some_words
from vlm_lora.model.backbone import Backbone


class Prefix(nn.Module):
    """``keys`` and ``values``, each ``(layers, key_value_heads, count, head_dim)``; in float32 or better.

    `Backbone.forward` puts them before the sequence, as long as they are ``on``.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        precise = torch.promote_types(keys.dtype, torch.float32)
        self.keys = nn.Parameter(keys.detach().to(precise, copy=True))
        self.values = nn.Parameter(values.detach().to(precise, copy=True))
        self.on = True


@torch.no_grad()
def pairs_of(backbone: Backbone, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that ``words`` leave in every layer when a sequence begins with them."""
    cache = backbone.new_cache()
    positions = torch.arange(len(words), device=backbone.device).expand(3, 1, -1)
    backbone.forward(words[None], torch.ones_like(words)[None], positions, None, cache)
    keys = torch.cat([layer.keys for layer in cache.layers])
    return keys, torch.cat([layer.values for layer in cache.layers])


def add_prefix(backbone: Backbone, count: int, seed: int) -> list[nn.Module]:
    """Give each language layer ``count`` trained pairs; their first values come from ``seed``. The module that is
    new.

    Raises:
        AdapterError: the base has layers without keys and values.
    """
    if backbone.family.recurrent:
        raise AdapterError(
            f"--method prefix: most layers of {backbone.name} are of linear attention, which has no keys and values to "
            "put before the others. Take lora, qlora, adapter or prompt."
        )
    backbone.language_model.prefix = Prefix(*pairs_of(backbone, some_words(backbone, count, seed)))
    return [backbone.language_model.prefix]
