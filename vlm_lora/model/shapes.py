"""The sizes of a base model, and random models of these sizes: what its config tells, without its weights."""

from dataclasses import dataclass

import torch
from torch import nn

from vlm_lora.model.attention import use_packed_attention
from vlm_lora.model.backbone import Backbone
from vlm_lora.model.device import resolve_dtype
from vlm_lora.model.families import FAMILIES, QwenVL
from vlm_lora.model.folder import cannot_be_loaded, check_model_folder, find_model
from vlm_lora.model.preprocess import load_preprocessor


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """Sizes of a base model, from its config alone. ``linears`` of a part are (inputs, outputs) of each of its linears,
    those of all its layers."""

    parameters: int
    language_linears: tuple[tuple[int, int], ...]
    tower_linears: tuple[tuple[int, int], ...]
    merger_linears: tuple[tuple[int, int], ...]
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    query_norms: bool
    """Whether queries and keys go through norms of their own."""
    vocabulary: int
    tower_width: int
    feature_width: int
    """Numbers that the tower gives for a patch."""
    tower_windows: tuple[int | None, ...]
    """Patches that see each other, for each layer of the tower; None: all of an image's."""


def load_shapes(name: str) -> Shapes:
    """A base model's sizes; no weights are read."""
    return shapes_of(_without_weights(name))


def shapes_of(model: QwenVL) -> Shapes:
    """The sizes of a model that no adapter sits in yet."""
    text, vision, visual = model.config.text_config, model.config.vision_config, model.model.visual
    layers = model.model.language_model.layers
    attention = next(layer.self_attn for layer in layers if hasattr(layer, "self_attn"))
    family = FAMILIES[model.config.model_type]
    mergers = family.mergers_of(model)
    patch = visual.patch_embed.proj.weight
    return Shapes(
        parameters=sum(map(num_numbers, model.parameters())),
        language_linears=_linears(model.model.language_model.layers),
        tower_linears=(*_linears(visual.blocks), (patch[0].numel(), len(patch))),
        merger_linears=tuple(each for merger in mergers for each in _linears(merger)),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=attention.head_dim,
        query_norms=hasattr(attention, "q_norm"),
        vocabulary=text.vocab_size,
        tower_width=len(patch),
        feature_width=len(patch) * len(mergers),
        tower_windows=family.windows(vision),
    )


def num_numbers(parameter: nn.Parameter) -> int:
    """How many it holds, also where two of them are kept in a byte."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state else parameter.numel()


def _linears(part: nn.Module) -> tuple[tuple[int, int], ...]:
    return tuple((m.in_features, m.out_features) for m in part.modules() if isinstance(m, nn.Linear))


def load_sample(name: str, *, dtype: str, device: torch.device) -> Backbone:
    """One random layer of language and of tower each, as wide as the base's, to measure how fast they are here."""
    model = _without_weights(name, device, resolve_dtype(dtype, device), layers=1)
    base = load_preprocessor(name)
    return Backbone(model=model.requires_grad_(False), processor=base.processor, name=name, family=base.family)


def _without_weights(
    name: str, device: torch.device | str = "meta", dtype: torch.dtype = torch.float32, layers: int | None = None
) -> QwenVL:
    """The model with random weights, which on the meta device are shapes alone; with fewer ``layers``, few tokens."""
    import transformers

    folder = find_model(name, weights=False)
    family = FAMILIES[check_model_folder(folder, name, weights=False)["model_type"]]
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise cannot_be_loaded(name, folder, error) from error
    if layers:
        text, vision = config.text_config, config.vision_config
        text.num_hidden_layers, text.vocab_size, text.pad_token_id, vision.depth = layers, 1024, None, layers
        family.shorten(config, layers)
    with torch.device(device):
        model = family.model_class._from_config(config, attn_implementation="sdpa", dtype=dtype)
    use_packed_attention(model)
    return model
