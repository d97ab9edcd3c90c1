"""From the name of a method to what attaches it, and from an adapter folder to what loads it."""

from pathlib import Path

from vlm_lora.config import TrainConfig
from vlm_lora.model.adapters.base import Adapter
from vlm_lora.model.adapters.lora import attach_lora, load_lora
from vlm_lora.model.backbone import Backbone


def attach_adapter(backbone: Backbone, config: TrainConfig) -> Adapter:
    """A new adapter of ``config.method``, ready to be trained; everything else is frozen."""
    return attach_lora(
        backbone,
        rank=config.rank,
        alpha=config.lora_alpha,
        dropout=config.dropout,
        seed=config.seed,
        prompt=config.prompt,
        variant=config.variant or "plain",
        targets=config.lora_targets,
    )


def load_adapter(backbone: Backbone, folder: Path) -> Adapter:
    """A saved adapter attached, ready for inference.

    Raises:
        AdapterError: of a method unknown here, made for another base, or any key is without its counterpart.
    """
    return load_lora(backbone, folder)
