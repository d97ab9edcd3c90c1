"""Adapter tuning (arXiv:1902.00751): a small two-layer network after attention and after the MLP of each language
layer.

It follows ``o_proj`` (``out_proj`` in linear attention) and ``down_proj``, before the residual is added:
``y + up(gelu(down(y)))``. ``up`` starts at zero, so at the start the model is the base model. Saved are, for each of
those linears, ``bottleneck.down`` and ``bottleneck.up``, weight ``(size, hidden)`` and ``(hidden, size)`` and bias; the
settings are ``{"method": "adapter", "bottleneck": size}``.
"""

import torch
from torch import nn
from torch.nn import functional as F

from vlm_lora.model.backbone import Backbone

START = 0.01
"""Standard deviation of the first values of the way down; the paper's."""


class Bottleneck(nn.Module):
    """Two linears with a GELU between; in float32 or better, whatever the base is in."""

    def __init__(self, width: int, size: int, like: torch.Tensor):
        super().__init__()
        kind = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
        self.down, self.up = nn.Linear(width, size, **kind), nn.Linear(size, width, **kind)

    @torch.no_grad()
    def start(self, draw: torch.Generator) -> None:
        self.down.weight.copy_(torch.randn(self.down.weight.shape, generator=draw) * START)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            tensor.zero_()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.up(F.gelu(self.down(hidden.to(self.down.weight.dtype)))).to(hidden.dtype)


class WithBottleneck(nn.Module):
    """A linear of the base with a bottleneck after it."""

    def __init__(self, base: nn.Module, bottleneck: Bottleneck):
        super().__init__()
        self.base, self.bottleneck = base, bottleneck
        self.on = True

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.base(hidden)
        return hidden + self.bottleneck(hidden) if self.on else hidden


def add_bottlenecks(backbone: Backbone, size: int, seed: int) -> list[nn.Module]:
    """Put bottlenecks of ``size`` into the model; their first values come from ``seed``. The modules that are new."""
    draw = torch.Generator().manual_seed(seed)
    added: list[nn.Module] = []
    for layer in backbone.language_model.layers:
        linear = getattr(layer, "linear_attn", None)
        attention = (linear, "out_proj") if linear else (layer.self_attn, "o_proj")
        for owner, name in (attention, (layer.mlp, "down_proj")):
            base = getattr(owner, name)
            bottleneck = Bottleneck(base.out_features, size, layer.input_layernorm.weight)
            bottleneck.start(draw)
            added.append(WithBottleneck(base, bottleneck))
            setattr(owner, name, added[-1])
    return added
