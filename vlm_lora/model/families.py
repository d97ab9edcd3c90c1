"""What a family of Qwen-VL models decides, in one table. Nothing else in the package asks which family a model is of.

A new family is one entry in `FAMILIES`, and the functions that it alone needs.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vlm_lora.model.boxes import Convention


class QwenVL(nn.Module):
    """What is used here of transformers' classes: a declaration for readers and type checkers. No object is of it."""

    model: Any
    """Holds ``visual`` (`Family.tower` and `Family.mergers`) and ``language_model`` (``embed_tokens``, ``layers``)."""
    lm_head: nn.Module
    config: Any
    generation_config: Any
    enable_input_require_grads: Callable[[], None]


def _cut_layer_types(config: Any, layers: int) -> None:
    config.text_config.layer_types = config.text_config.layer_types[:layers]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One family. Parts of the tower are named as in ``visual``, linears in full."""

    class_name: str
    """Of the model, in transformers."""
    linears: dict[str, str]
    """Patterns of the linears that LoRA adapts, by part: language, projector, vision. Whole names, as PEFT's
    "all-linear" would adapt the tower too."""
    boxes: Convention
    """How it says where in an image something is (`model.boxes` has the sources)."""
    tower: tuple[str, ...] = ("patch_embed", "rotary_pos_emb", "blocks")
    """The parts of the vision tower, which ends before the mergers."""
    mergers: tuple[str, ...] = ("merger",)
    """Modules, or lists of them: that of the tower's last layer, then those of the inner layers that are shown too."""
    features: Callable[[Any, Any, torch.Tensor], torch.Tensor] = lambda visual, output, grid_thw: (
        output.last_hidden_state
    )
    """From ``visual``, the output of its forward without mergers, and ``grid_thw`` ``(num_images, 3)`` to the features
    ``(patches, width * number of mergers)``, in reading order."""
    shorten: Callable[[Any, int], None] = _cut_layer_types
    """Cuts what a config says of each layer down to fewer layers."""
    recurrent: bool = False
    """Whether most of its language layers are of linear attention, which carries a state from token to token."""
    template_options: dict[str, Any] = field(default_factory=dict)
    """What the chat template needs to be told to open an answer alike where it is asked for and where it is learnt."""

    @property
    def model_class(self) -> Any:
        import transformers

        return getattr(transformers, self.class_name)

    @property
    def tower_prefixes(self) -> tuple[str, ...]:
        """What the names of the tower's parameters begin with."""
        return tuple(f"model.visual.{part}." for part in self.tower)

    def mergers_of(self, model: QwenVL) -> list[nn.Module]:
        """The projector, a module for each layer of the tower that is shown: the last one's comes first."""
        parts = [getattr(model.model.visual, name) for name in self.mergers]
        return [merger for part in parts for merger in (part if isinstance(part, nn.ModuleList) else [part])]


def _linears(*, projector: str, vision_mlp: str, recurrent: str = "") -> dict[str, str]:
    kinds = r"self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj" + recurrent
    return {
        "language": rf"model\.language_model\.layers\.\d+\.(?:{kinds})",
        "projector": rf"model\.visual\.{projector}",
        "vision": rf"model\.visual\.blocks\.\d+\.(?:attn\.(?:qkv|proj)|mlp\.{vision_mlp})",
    }


def _out_of_windows(visual: Any, output: Any, grid_thw: torch.Tensor) -> torch.Tensor:
    """Qwen2.5-VL's tower works in windows and orders its tokens back after the merger; here it is done before."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        get_vision_window_index,  # pyright: ignore[reportPrivateImportUsage]  # here in all releases that are tested
    )

    size = visual.spatial_merge_size
    index, _ = get_vision_window_index(
        grid_thw, spatial_merge_size=size, window_size=visual.window_size, patch_size=visual.patch_size
    )
    features = output.last_hidden_state
    return features.view(-1, size**2, features.shape[-1])[torch.argsort(index)].reshape(features.shape)


def _inner_layers_too(visual: Any, output: Any, grid_thw: torch.Tensor) -> torch.Tensor:
    return torch.cat([output.last_hidden_state, *output.deepstack_features], 1)


def _show_no_inner_layers(config: Any, layers: int) -> None:
    config.vision_config.deepstack_visual_indexes = []


FAMILIES = {
    "qwen2_vl": Family(
        class_name="Qwen2VLForConditionalGeneration",
        linears=_linears(projector=r"merger\.mlp\.[02]", vision_mlp="fc[12]"),  # merger.mlp.1 is the activation
        boxes=Convention(in_pixels=False, by_tokens=True),
    ),
    "qwen2_5_vl": Family(
        class_name="Qwen2_5_VLForConditionalGeneration",
        linears=_linears(projector=r"merger\.mlp\.[02]", vision_mlp="(?:gate|up|down)_proj"),
        features=_out_of_windows,
        boxes=Convention(in_pixels=True),
    ),
    # Shows its language layers some of the tower's inner layers too (DeepStack, arXiv:2406.04334): each goes through a
    # merger of its own, and is added to what one of the first language layers gives.
    "qwen3_vl": Family(
        class_name="Qwen3VLForConditionalGeneration",
        linears=_linears(projector=r"(?:merger|deepstack_merger_list\.\d+)\.linear_fc[12]", vision_mlp="linear_fc[12]"),
        tower=("patch_embed", "pos_embed", "rotary_pos_emb", "blocks"),
        mergers=("merger", "deepstack_merger_list"),
        boxes=Convention(in_pixels=False),
        features=_inner_layers_too,
        shorten=_show_no_inner_layers,
    ),
    # Three of four language layers are of linear attention (arXiv:2412.06464); the tower is Qwen3-VL's, and shows no
    # inner layers. 3.6 and 3.8 are of this type too. Most think before they answer, unless they are told not to.
    "qwen3_5": Family(
        class_name="Qwen3_5ForConditionalGeneration",
        linears=_linears(
            projector=r"merger\.linear_fc[12]",
            vision_mlp="linear_fc[12]",
            recurrent=r"|linear_attn\.(?:in_proj_(?:qkv|z|b|a)|out_proj)",
        ),
        boxes=Convention(in_pixels=False),  # taken for Qwen3-VL's: it has no source of its own
        tower=("patch_embed", "pos_embed", "rotary_pos_emb", "blocks"),
        recurrent=True,
        template_options={"enable_thinking": False},
    ),
}
"""By ``model_type`` in ``config.json``."""


# -- parameters by their names, which are alike in all families ------------------------------------------------------

PARTS = ("vision tower", "merger (projector)", "language layers", "embeddings and head")

ADAPTED = re.compile(r"\.(?:lora_|modules_to_save\.|bottleneck\.|prompt|prefix\.)")
"""Where in a parameter's name an adapter begins; what stands before it is the module that is adapted."""


def part_of(name: str) -> str:
    """The one of `PARTS` that a parameter is in."""
    if name.startswith(tuple(prefix for family in FAMILIES.values() for prefix in family.tower_prefixes)):
        return PARTS[0]
    if name.startswith("model.visual."):
        return PARTS[1]
    return PARTS[2 if name.startswith(("model.language_model.layers.", "model.language_model.prefix.")) else 3]
