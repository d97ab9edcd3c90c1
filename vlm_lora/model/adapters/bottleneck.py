"""Adapter tuning (arXiv:1902.00751): a small two-layer network behind attention and behind the MLP of each
language layer.

Behind ``o_proj`` and ``down_proj``, before the residual is added: ``y + up(gelu(down(y)))``. ``up`` starts at
zero, so at the start the model is the base model. Saved are, for each of those linears, ``bottleneck.down``
and ``bottleneck.up``, weight ``(size, hidden)`` and ``(hidden, size)`` and bias; the settings are
``{"method": "adapter", "bottleneck": size}``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

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
from vlm_lora.model.backbone import Backbone

START = 0.01
"""Standard deviation of the way down's first values; the paper's."""


class Bottleneck(nn.Module):
    """Two linears with a GELU between; in float32 or better, whatever the base is in."""

    def __init__(self, width: int, size: int, like: torch.Tensor):
        super().__init__()
        kind = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
        self.down, self.up = nn.Linear(width, size, **kind), nn.Linear(size, width, **kind)

    def start(self, draw: torch.Generator) -> None:
        with torch.no_grad():
            self.down.weight.copy_(torch.randn(self.down.weight.shape, generator=draw) * START)
            for tensor in (self.down.bias, self.up.weight, self.up.bias):
                tensor.zero_()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.up(F.gelu(self.down(hidden.to(self.down.weight.dtype)))).to(hidden.dtype)


class WithBottleneck(nn.Module):
    """A linear of the base with a bottleneck behind it."""

    def __init__(self, base: nn.Module, bottleneck: Bottleneck):
        super().__init__()
        self.base, self.bottleneck = base, bottleneck
        self.on = True

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.base(hidden)
        return hidden + self.bottleneck(hidden) if self.on else hidden


def attach_bottleneck(backbone: Backbone, *, size: int, seed: int, prompt: str) -> Adapter:
    """Freeze the base and add bottlenecks of ``size``; their first values come from ``seed``."""
    return _attach(backbone, size, seed, new_contract(backbone, "adapter", prompt))


def load_bottleneck(backbone: Backbone, folder: Path) -> Adapter:
    """Attach a saved adapter, ready for inference.

    Raises:
        AdapterError: made for another base, or any key is without its counterpart.
    """
    size = size_in(read_settings(folder), "bottleneck", folder)
    adapter = _attach(backbone, size, 0, check_contract(backbone, folder))
    read_tensors(dict(adapter.named_parameters()), folder, backbone.name)
    return adapter


def _attach(backbone: Backbone, size: int, seed: int, contract: Contract | None) -> Adapter:
    backbone.model.requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    wrapped: list[WithBottleneck] = []
    for layer in backbone.language_model.layers:
        for owner, name in ((layer.self_attn, "o_proj"), (layer.mlp, "down_proj")):
            base = getattr(owner, name)
            bottleneck = Bottleneck(base.out_features, size, layer.input_layernorm.weight)
            bottleneck.start(draw)
            wrapped.append(WithBottleneck(base, bottleneck))
            setattr(owner, name, wrapped[-1])
    saved = {n: p for n, p in backbone.model.named_parameters() if ".bottleneck." in n}

    @contextmanager
    def disable() -> Iterator[None]:
        for module in wrapped:
            module.on = False
        try:
            yield
        finally:
            for module in wrapped:
                module.on = True

    def write(folder: Path) -> None:
        write_tensors(saved, {"method": "adapter", "bottleneck": size}, folder)

    return Adapter(backbone, contract, disable, write)
