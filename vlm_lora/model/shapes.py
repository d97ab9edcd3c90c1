"""Base models without their weights: their sizes, from ``config.json`` alone, and random ones of these sizes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vlm_lora.model.attention import use_packed_attention
from vlm_lora.model.backbone import WHOLE_LINEARS, Backbone, require_bitsandbytes
from vlm_lora.model.device import resolve_dtype
from vlm_lora.model.families import FAMILIES, QwenVL
from vlm_lora.model.folder import cannot_be_loaded, check_model_folder, find_model
from vlm_lora.model.preprocess import load_preprocessor


def num_numbers(parameter: nn.Parameter) -> int:
    """How many it holds, also where two of them are kept in a byte."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state else parameter.numel()


def layer_kinds(name: str) -> tuple[str, ...]:
    """The kind of each language layer of a base model, as its config calls it."""
    text = _config(name).text_config
    return tuple(getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers)


def num_inner_layers(name: str) -> int:
    """How many inner layers of the tower a base model shows to its first language layers, one to each."""
    return len(getattr(_config(name).vision_config, "deepstack_visual_indexes", ()))


def load_shapes(
    name: str, *, dtype: torch.dtype = torch.float32, layers: Sequence[str] | None = None, quantised: bool = False
) -> Backbone:
    """A base model on the meta device, which has shapes and no values.

    Args:
        layers: the kinds of its language layers; by default all that it has.
        quantised: keep their linears in four bits, as `load_backbone` does.
    """
    config = _config(name)
    _cut(config, layers or layer_kinds(name))
    backbone = _random(name, config, "meta", dtype)
    if quantised:
        _quantise(backbone.language_model.layers, dtype)
    backbone.quantised = quantised
    return backbone


def load_sample(name: str, *, dtype: str, device: torch.device) -> Backbone:
    """One random layer of each kind and one of the tower, as wide as the base's, to measure how fast they are here."""
    kinds, config = tuple(dict.fromkeys(layer_kinds(name))), _config(name)
    config.text_config.vocab_size, config.text_config.pad_token_id, config.vision_config.depth = 1024, None, 1
    FAMILIES[config.model_type].shorten(config, 1)
    _cut(config, kinds)
    return _random(name, config, device, resolve_dtype(dtype, device))


def _cut(config: Any, layers: Sequence[str]) -> None:
    config.text_config.num_hidden_layers = len(layers)
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = list(layers)


def _config(name: str) -> Any:
    import transformers

    folder = find_model(name, weights=False)
    check_model_folder(folder, name, weights=False)
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise cannot_be_loaded(name, folder, error) from error


def _random(name: str, config: Any, device: torch.device | str, dtype: torch.dtype) -> Backbone:
    base = load_preprocessor(name)
    with torch.device(device):
        model: QwenVL = base.family.model_class._from_config(config, attn_implementation="sdpa", dtype=dtype)
    use_packed_attention(model)
    return Backbone(model=model.requires_grad_(False), processor=base.processor, name=name, family=base.family)


def _quantise(part: nn.Module, dtype: torch.dtype) -> None:
    """Put NF4 linears with double quantisation, of shapes alone, in the places of the linears in ``part``."""
    require_bitsandbytes()
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import modules

    def empty(count: int, kind: torch.dtype) -> torch.Tensor:
        return torch.empty(count, dtype=kind, device="meta")

    linears = [(owner, key, each) for owner in part.modules() for key, each in owner.named_children()]
    for owner, key, linear in linears:
        if not isinstance(linear, nn.Linear) or key in WHOLE_LINEARS:
            continue
        new = modules.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, dtype, device="meta")
        blocks = -(-linear.weight.numel() // 64)
        scales = QuantState(
            empty(-(-blocks // 256), torch.float32), code=empty(256, torch.float32), blocksize=256, dtype=torch.float32
        )
        state = QuantState(
            empty(blocks, torch.uint8),
            shape=linear.weight.shape,
            code=empty(16, torch.float32),
            blocksize=64,
            quant_type="nf4",
            dtype=dtype,
            offset=torch.empty((), device="meta"),
            state2=scales,
        )
        packed = torch.empty(-(-linear.weight.numel() // 2), 1, dtype=torch.uint8, device="meta")
        settings: dict[str, Any] = {"quant_state": state, "module": new, "bnb_quantized": True}
        weight = modules.Params4bit(packed, requires_grad=False, **settings)
        # PEFT copies it for DoRA, and bitsandbytes cannot copy shapes.
        weight.__deepcopy__ = lambda memo, weight=weight: weight
        new.weight = weight
        new.bias = linear.bias
        setattr(owner, key, new)
