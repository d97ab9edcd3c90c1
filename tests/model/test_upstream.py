"""What we rely on in transformers, by name. If one of these has gone in a new release, this says which.

Run: pytest tests/model/test_upstream.py
With the oldest and the newest release: python -m bench.upstream, which records it in bench/results/upstream.json.
"""

import importlib
import inspect
import re
import warnings

import pytest
import torch
import transformers

from vlm_lora.model.backbone import load_backbone
from vlm_lora.model.shapes import load_shapes

MODEL = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL", "qwen3_5": "Qwen3_5"}
ARGUMENTS = {
    "model.language_model.forward": "inputs_embeds attention_mask position_ids use_cache",
    "model.get_rope_index": "input_ids mm_token_type_ids image_grid_thw",
    "model.visual.forward": "grid_thw",
    "_from_config": "config",
}
OWN_ARGUMENTS = {"qwen3_vl": {"model.language_model.forward": "visual_pos_masks deepstack_visual_embeds"}}
ATTENTION = {"qwen3_5": 3}  # the first layer that has any, if it is not layer 0
PLACES = """
    lm_head.weight model.visual.patch_embed.proj.weight model.visual.blocks model.visual.rotary_pos_emb
    model.visual.merger model.language_model.embed_tokens.weight
    model.language_model.norm.weight model.language_model.layers.0.input_layernorm.weight
    model.language_model.layers.{}.self_attn.q_proj.weight model.language_model.layers.{}.self_attn.k_proj.weight
    model.language_model.layers.{}.self_attn.v_proj.weight model.language_model.layers.{}.self_attn.o_proj.weight
    model.language_model.layers.{}.self_attn.head_dim model.language_model.layers.0.mlp.gate_proj.weight
    model.language_model.layers.0.mlp.up_proj.weight model.language_model.layers.0.mlp.down_proj.weight
    config.vision_config.depth config.vision_config.patch_size config.text_config.num_key_value_heads
    config.text_config.vocab_size config.image_token_id generation_config.eos_token_id
"""
QWEN2 = "model.visual.merger.mlp.0.weight model.visual.merger.mlp.2.weight config.text_config.layer_types"
OWN_PLACES = {
    "qwen2_vl": QWEN2,
    "qwen2_5_vl": f"""
        {QWEN2} model.visual.window_size model.visual.patch_size model.visual.spatial_merge_size
        config.vision_config.fullatt_block_indexes config.vision_config.window_size
    """,
    "qwen3_vl": """
        model.visual.merger.linear_fc1.weight model.visual.merger.linear_fc2.weight model.visual.pos_embed.weight
        model.visual.deepstack_merger_list.0.linear_fc1.weight model.visual.deepstack_merger_list.0.linear_fc2.weight
        model.language_model.layers.0.self_attn.q_norm.weight config.vision_config.deepstack_visual_indexes
    """,
    "qwen3_5": """
        model.visual.merger.linear_fc1.weight model.visual.merger.linear_fc2.weight model.visual.pos_embed.weight
        model.language_model.layers.0.linear_attn.in_proj_qkv.weight
        model.language_model.layers.0.linear_attn.in_proj_z.weight
        model.language_model.layers.0.linear_attn.in_proj_b.weight
        model.language_model.layers.0.linear_attn.in_proj_a.weight
        model.language_model.layers.0.linear_attn.out_proj.weight
        model.language_model.layers.0.linear_attn.conv1d.weight
        model.language_model.layers.0.linear_attn.layer_idx model.language_model.layers.0.linear_attn.num_v_heads
        model.language_model.layers.0.linear_attn.head_k_dim model.language_model.layers.0.linear_attn.head_v_dim
        model.language_model.layers.0.linear_attn.conv_dim model.language_model.layers.0.linear_attn.conv_kernel_size
        config.text_config.layer_types
    """,
}
FUNCTIONS = {
    "transformers.models.qwen2_vl.image_processing_qwen2_vl.smart_resize": "factor min_pixels max_pixels",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.get_vision_window_index": (
        "grid_thw spatial_merge_size window_size patch_size"
    ),
    "transformers.DynamicCache": "config",
    "transformers.DynamicCache.update": "key_states value_states layer_idx",
    "transformers.DynamicCache.get_seq_length": "",
    "transformers.DynamicCache.reorder_cache": "beam_idx",
    "transformers.cache_utils.Cache": "layers",
    "transformers.cache_utils.LinearAttentionLayer": "number_of_states",
    "transformers.BitsAndBytesConfig": (
        "load_in_4bit bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_4bit_compute_dtype llm_int8_skip_modules"
    ),
}


def missing(owner, path: str, arguments: str = "") -> list[str]:
    """What of ``owner.path(arguments)`` is not there, in words."""
    found = owner
    for name in path.split("."):
        if name.isdigit():
            found = found[int(name)]
        elif hasattr(found, name):
            found = getattr(found, name)
        else:
            return [f"{path} (there is no {name})"]
    if not arguments:
        return []
    taken = inspect.signature(found).parameters
    return [f"argument {name} of {path}" for name in arguments.split() if name not in taken]


def told(gone: list[str]) -> str:
    what = f"transformers {transformers.__version__} has no longer what vlm_lora.model relies on"
    return f"{what}: {'; '.join(gone)}. Mend vlm_lora/model, or bound the version in pyproject.toml."


@pytest.mark.parametrize("family", MODEL)
def test_modules_and_arguments_have_their_names(checkpoints, family):
    assert hasattr(transformers, f"{MODEL[family]}ForConditionalGeneration")
    model = load_shapes(str(checkpoints[family])).model
    arguments = [*ARGUMENTS.items(), *OWN_ARGUMENTS.get(family, {}).items()]
    gone = [text for path, names in arguments for text in missing(model, path, names)]
    gone += [
        text
        for path in (PLACES.format(*[ATTENTION.get(family, 0)] * 5) + OWN_PLACES[family]).split()
        for text in missing(model, path)
    ]
    assert not gone, told(gone)


def test_functions_take_their_arguments():
    gone = []
    for path, arguments in FUNCTIONS.items():
        module, names = path.rsplit(".", 1)
        if module.endswith("DynamicCache"):
            module, names = "transformers", f"DynamicCache.{names}"
        gone += missing(importlib.import_module(module), names, arguments)
    assert not gone, told(gone)


@pytest.mark.parametrize("family", MODEL)
def test_a_cache_is_seen(checkpoints, family):
    """By calling: a name that the forward does not know is swallowed by its ``**kwargs``, in silence."""
    backbone = load_backbone(str(checkpoints[family]))
    ids, positions = torch.arange(5, 15)[None], torch.arange(10).expand(3, 1, -1)
    mask = torch.ones(1, 1, 10, 10, dtype=torch.bool).tril()
    if backbone.family.recurrent:  # whose cache goes with the other kind of mask alone
        mask = torch.ones(1, 10)

    def of(rows: slice, columns: slice) -> torch.Tensor:
        return mask[..., rows, columns] if mask.ndim == 4 else mask[:, columns]

    with torch.no_grad(), warnings.catch_warnings(action="error", category=FutureWarning):
        whole = backbone.forward(ids, mask, positions, None)[:, 6:]
        cache = backbone.new_cache()
        backbone.forward(ids[:, :6], of(slice(6), slice(6)), positions[..., :6], None, past_key_values=cache)
        behind = backbone.forward(
            ids[:, 6:], of(slice(6, None), slice(None)), positions[..., 6:], None, past_key_values=cache
        )
        alone = backbone.forward(
            ids[:, 6:], of(slice(6, None), slice(6, None)), positions[..., 6:], None
        )  # negative control
    blind = f"transformers {transformers.__version__}: language_model.forward does not see the cache it is given"
    assert torch.allclose(behind, whole, atol=1e-5), blind
    assert not torch.allclose(alone, whole, atol=1e-2)


def test_a_change_would_be_named(checkpoints):
    """Negative control."""
    model = load_shapes(str(checkpoints["qwen2_vl"])).model
    assert missing(model, "model.visual.projector.weight") == ["model.visual.projector.weight (there is no projector)"]
    gone = missing(model, "model.forward", "inputs_embeds features")
    assert re.match(r"transformers [\d.]+ has no longer .*: argument features of model\.forward", told(gone))
    assert len(gone) == 1
