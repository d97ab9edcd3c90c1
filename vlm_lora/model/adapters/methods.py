"""From the name of a method to what attaches it, and from an adapter folder to what loads it."""

from pathlib import Path

from vlm_lora.config import TrainConfig
from vlm_lora.errors import AdapterError
from vlm_lora.model.adapters.base import CONFIG, Adapter, read_settings
from vlm_lora.model.adapters.bottleneck import attach_bottleneck, load_bottleneck
from vlm_lora.model.adapters.lora import attach_lora, load_lora
from vlm_lora.model.adapters.prefix import attach_prefix, load_prefix
from vlm_lora.model.adapters.prompt import attach_prompt, load_prompt
from vlm_lora.model.backbone import Backbone

LOADERS = {"adapter": load_bottleneck, "prompt": load_prompt, "prefix": load_prefix}
"""By the ``method`` in ``adapter_config.json``; PEFT's own files name none."""


def attach_adapter(backbone: Backbone, config: TrainConfig) -> Adapter:
    """A new adapter of ``config.method``, ready to be trained; everything else is frozen."""
    common = {"seed": config.seed, "prompt": config.prompt}
    match config.method:
        case "adapter":
            return attach_bottleneck(backbone, size=config.bottleneck, **common)
        case "prompt":
            return attach_prompt(backbone, count=config.num_virtual_tokens, **common)
        case "prefix":
            return attach_prefix(backbone, count=config.num_virtual_tokens, **common)
        case _:
            return attach_lora(
                backbone,
                rank=config.rank,
                alpha=config.lora_alpha,
                dropout=config.dropout,
                variant=config.variant or "plain",
                targets=config.lora_targets,
                projector=config.lora_of_projector,
                method=config.method,
                **common,
            )


def load_adapter(backbone: Backbone, folder: Path) -> Adapter:
    """A saved adapter attached, ready for inference.

    Raises:
        AdapterError: of a method unknown here, made for another base, or any key is without its counterpart.
    """
    settings = read_settings(folder)
    method = settings.get("method")
    if method is None:
        return load_lora(backbone, folder)
    if method not in LOADERS:
        known = ", ".join(["lora", *LOADERS])
        raise AdapterError(f"{folder / CONFIG}: method is {method!r}; known here are {known}.")
    return LOADERS[method](backbone, folder)
