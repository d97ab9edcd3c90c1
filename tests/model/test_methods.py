"""Every method, from non-zero weights: packed and cached equals unpacked; off is the base; saved and loaded
is the same.

Prompt and prefix have references of their own here, written out by hand: one row an answer, the vectors put
before the embeddings or the pairs into the cache, positions from the model's own `get_rope_index`.
"""

import json
import re
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import DynamicCache

from tests.conftest import ROOT
from tests.model.test_exactness import (
    FAMILIES,
    FP64,
    assert_checkpointing_changes_nothing,
    assert_equal,
    fast,
    gradients,
    load_in,
    messages_of,
    naive,
    picture_of,
)
from tests.model.test_exactness import examples as examples
from vlm_lora.config import TrainConfig
from vlm_lora.errors import AdapterError, ConfigError
from vlm_lora.model import encode
from vlm_lora.model.adapters.methods import attach_adapter, load_adapter
from vlm_lora.model.adapters.prefix import pairs_of
from vlm_lora.model.backbone import Backbone, load_backbone

METHODS = {
    "lora": {"rank": 4},
    "rslora": {"rank": 4, "variant": "rslora"},
    "dora": {"rank": 4, "variant": "dora"},
    "pissa": {"rank": 4, "variant": "pissa"},
    "language only": {"rank": 4, "targets": "language"},
    "projector only": {"rank": 4, "targets": "projector"},
    "projector's own": {
        "rank": 4,
        "projector_rank": 6,
        "projector_alpha": 5.0,
        "projector_lr": 1e-2,
        "variant": "pissa",
    },
    "vision too": {"rank": 4, "targets": "language,projector,vision"},
    "adapter": {"method": "adapter", "bottleneck": 5},
    "prompt": {"method": "prompt", "num_virtual_tokens": 5},
    "prefix": {"method": "prefix", "num_virtual_tokens": 5},
}
SOFT = ["prompt", "prefix"]


def attach(checkpoints, method: str, family: str = "qwen2_vl", dtype=torch.float64, shaken: bool = True):
    """Base and adapter with every tensor moved away from where it starts."""
    backbone = load_in(checkpoints, family, dtype)
    adapter = attach_adapter(backbone, TrainConfig(data="none", **METHODS[method]))
    for i, (_, parameter) in enumerate(adapter.named_parameters()):
        torch.manual_seed(i)
        parameter.data = parameter.data.to(dtype)
        if shaken:
            parameter.data += torch.randn_like(parameter.data) * 0.3
    return backbone, adapter


def by_hand(backbone, examples, row_loss) -> torch.Tensor:
    """Mean over the labels of what ``row_loss`` gives for each answer; one turn each, rendered whole."""
    total, count = 0.0, 0
    processor, tokenizer = backbone.processor, backbone.tokenizer
    for example in examples:
        for dialogue in example.dialogues:
            (turn,) = dialogue.turns
            text = processor.apply_chat_template(messages_of(dialogue, len(example.images)), tokenize=False)
            inputs = processor(text=[text], images=[picture_of(i) for i in example.images] or None, return_tensors="pt")
            ids = inputs["input_ids"]
            answer = len(tokenizer(turn.assistant + "<|im_end|>")["input_ids"])
            logits = row_loss(ids, inputs.get("pixel_values"), inputs.get("image_grid_thw"))[:, -ids.shape[1] :]
            last = ids.shape[1] - 1  # the line break behind the answer's end
            assert ids[0, last - 1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
            at = slice(last - answer, last)
            total = total + F.cross_entropy(logits[0, at.start - 1 : at.stop - 1], ids[0, at], reduction="sum")
            count += answer
    return total / count


def embedded(backbone, ids, pixel_values, grid, before=()) -> dict:
    """What the language model takes: vectors ``(1, len(before) + T, hidden)``, those of images in their places; and of
    Qwen3-VL what its tower's inner layers show."""
    table = dict(backbone.model.named_parameters())
    table = table.get(
        "model.language_model.embed_tokens.base.weight", table.get("model.language_model.embed_tokens.weight")
    )
    vectors, more = table[ids], {}
    places = ids == backbone.image_token_id
    if pixel_values is not None:
        given = backbone.model.model.visual(pixel_values.to(table.dtype), grid_thw=grid)
        merged = given.pooler_output
        merged = torch.cat(merged) if isinstance(merged, tuple | list) else merged
        vectors = vectors.masked_scatter(places[..., None], merged)
        if backbone.model.config.model_type == "qwen3_vl":
            places = torch.cat([torch.zeros(1, len(before), dtype=torch.bool), places], 1)
            more = {"visual_pos_masks": places, "deepstack_visual_embeds": given.deepstack_features}
    return {"inputs_embeds": torch.cat([before[None], vectors], 1) if len(before) else vectors} | more


def positions_behind(backbone, count: int, ids, grid) -> torch.Tensor:
    """``(3, 1, count + T)``, of a sequence that begins with ``count`` tokens of text."""
    longer = torch.cat([torch.zeros(1, count, dtype=torch.long), ids], 1)
    kinds = (longer == backbone.image_token_id).int()
    if grid is None:
        return torch.arange(longer.shape[1]).expand(3, 1, -1)
    return backbone.model.model.get_rope_index(longer, mm_token_type_ids=kinds, image_grid_thw=grid)[0]


def prompt_logits(backbone, vectors, ids, pixel_values, grid) -> torch.Tensor:
    hidden = backbone.language_model(
        **embedded(backbone, ids, pixel_values, grid, before=vectors),
        position_ids=positions_behind(backbone, len(vectors), ids, grid),
        attention_mask=torch.ones(1, len(vectors) + ids.shape[1]),
        use_cache=False,
    ).last_hidden_state
    return backbone.model.lm_head(hidden)


def prefix_logits(backbone, keys, values, ids, pixel_values, grid) -> torch.Tensor:
    count = keys.shape[2]
    cache = DynamicCache()
    for layer in range(len(keys)):
        cache.update(keys[layer][None], values[layer][None], layer)
    hidden = backbone.language_model(
        **embedded(backbone, ids, pixel_values, grid),
        position_ids=positions_behind(backbone, count, ids, grid)[:, :, count:],
        attention_mask=torch.ones(1, count + ids.shape[1]),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return backbone.model.lm_head(hidden)


LOGITS = {"prompt": prompt_logits, "prefix": prefix_logits}


def reference(backbone, adapter, examples, method: str) -> torch.Tensor:
    """The plain way of computing the loss; leaves gradients to be taken."""
    if method not in SOFT:
        return naive(backbone, examples)
    tensors = [p for _, p in adapter.named_parameters()]
    with adapter.switched_off():
        return by_hand(backbone, examples, partial(LOGITS[method], backbone, *tensors))


def one_turn_only(examples, method):
    return [e for e in examples if method not in SOFT or all(len(d.turns) == 1 for d in e.dialogues)]


@pytest.mark.parametrize(
    ("method", "family"), [(m, f) for f in FAMILIES for m in METHODS if (m, f) != ("prefix", "qwen3_5")]
)
def test_packed_and_cached_equal_unpacked(checkpoints, examples, tmp_path, method, family):
    backbone, adapter = attach(checkpoints, method, family)
    examples = one_turn_only(examples, method)
    wanted = reference(backbone, adapter, examples, method)
    expected = gradients(adapter, wanted)
    longer = 10 if method == "vision too" else 1  # the way of the gradients; measured in double: 4e-12
    for max_tokens, cache in ((4096, tmp_path / "cache"), (90, tmp_path / "cache")):
        loss = fast(backbone, examples, max_tokens, cache)
        torch.testing.assert_close(loss, wanted, rtol=FP64[family], atol=0)
        assert_equal(gradients(adapter, loss), expected, longer * FP64[family])


@pytest.mark.parametrize(
    ("method", "family"),
    [*[(m, "qwen2_vl") for m in METHODS], ("lora", "qwen3_vl"), *[(m, "qwen3_5") for m in ("lora", "prompt")]],
)
def test_gradient_checkpointing_changes_nothing(checkpoints, examples, method, family):
    """Also not the prefix's pairs, which transformers' own checkpointing takes away."""
    _, adapter = attach(checkpoints, method, family)
    assert_checkpointing_changes_nothing(adapter, examples, 1e-12)


@pytest.mark.parametrize("method", SOFT)
def test_started_from_words_it_is_the_base_with_these_words_before_it(checkpoints, examples, method):
    """Vectors that are words' embeddings, pairs that are what words leave: the base itself, reading the
    words, agrees.
    """
    examples = one_turn_only(examples, method)
    backbone, adapter = attach(checkpoints, method, shaken=False)
    words = torch.tensor([7, 300, 41, 41, 99])
    table = dict(backbone.model.named_parameters())
    name = "embed_tokens.base.weight" if method == "prompt" else "embed_tokens.weight"
    vectors = table["model.language_model." + name][words]
    if method == "prompt":
        dict(adapter.named_parameters())["model.language_model.embed_tokens.prompt"].data = vectors.clone()
    else:
        with adapter.switched_off():
            keys, values = pairs_of(backbone, words)
        backbone.prefix.keys.data, backbone.prefix.values.data = keys.double(), values.double()
    loss = fast(backbone, examples, 4096)
    with adapter.switched_off():
        wanted = by_hand(backbone, examples, partial(prompt_logits, backbone, vectors))
    torch.testing.assert_close(loss, wanted, rtol=FP64["qwen2_vl"], atol=0)


@pytest.mark.parametrize("fault", ["prompt's positions", "prefix's positions", "prefix's mask"])
def test_a_fault_would_be_noticed(checkpoints, examples, fault, monkeypatch):
    """Negative controls: positions that do not begin behind the vectors, a mask that hides one pair."""
    examples = one_turn_only(examples, "prompt")
    method = fault.split("'")[0]
    backbone, adapter = attach(checkpoints, method)
    expected = gradients(adapter, reference(backbone, adapter, examples, method))
    if method == "prompt":

        def positions(ids, *rest):
            return mrope_positions(ids, *rest) - 5 * (ids >= 0)

        mrope_positions = encode.mrope_positions
        monkeypatch.setattr(encode, "mrope_positions", positions)
    else:
        right = Backbone._after_prefix

        def wrong(self, mask, positions, cache):
            mask, positions = right(self, mask, positions, cache)
            if fault.endswith("positions"):
                return mask, positions - 5
            mask[..., 0] = False
            return mask, positions

        monkeypatch.setattr(Backbone, "_after_prefix", wrong)
    with pytest.raises(AssertionError):
        assert_equal(gradients(adapter, fast(backbone, examples, 4096)), expected, 1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_switched_off_it_is_the_base_to_the_last_bit(checkpoints, examples, method):
    base = load_backbone(str(checkpoints["qwen2_vl"]), dtype="float32")
    backbone, adapter = attach(checkpoints, method, dtype=torch.float32)
    with torch.no_grad():
        wanted = fast(base, examples, 4096)
        with adapter.switched_off():
            assert torch.equal(fast(backbone, examples, 4096), wanted)
        assert (fast(backbone, examples, 4096) - wanted).abs() > 1e-3


@pytest.mark.parametrize("method", ["lora", "rslora", "adapter"])
def test_at_the_start_it_is_the_base(checkpoints, examples, method):
    base = load_backbone(str(checkpoints["qwen2_vl"]), dtype="float32")
    backbone, _ = attach(checkpoints, method, dtype=torch.float32, shaken=False)
    with torch.no_grad():
        assert torch.equal(fast(backbone, examples, 4096), fast(base, examples, 4096))


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_it_is_the_same(checkpoints, examples, tmp_path, method):
    backbone, adapter = attach(checkpoints, method, dtype=torch.float32)
    adapter.save(tmp_path / "adapter")
    fresh = load_backbone(str(checkpoints["qwen2_vl"]), dtype="float32")
    loaded = load_adapter(fresh, tmp_path / "adapter")
    assert loaded.contract == adapter.contract
    assert loaded.named_parameters() == []
    with torch.no_grad():
        assert torch.equal(fast(fresh, examples, 4096), fast(backbone, examples, 4096))


def test_a_prefix_is_refused_where_layers_have_no_keys(checkpoints, tmp_path):
    _, adapter = attach(checkpoints, "prefix", dtype=torch.float32)
    adapter.save(tmp_path)
    (tmp_path / "contract.json").unlink()
    backbone = load_backbone(str(checkpoints["qwen3_5"]))
    for attempt in (
        lambda: attach_adapter(backbone, TrainConfig(data="none", **METHODS["prefix"])),
        lambda: load_adapter(backbone, tmp_path),
    ):
        with pytest.raises(AdapterError, match=r"--method prefix: .*linear attention.* Take lora") as caught:
            attempt()
        assert "\n" not in str(caught.value)


PAGE = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", ["adapter", "prompt", "prefix"])
def test_the_documented_tensors_are_those_on_disk(checkpoints, tmp_path, method):
    backbone, adapter = attach(checkpoints, method, dtype=torch.float32)
    adapter.save(tmp_path)
    config = backbone.model.config.text_config
    sizes = METHODS[method] | {
        "layers": config.num_hidden_layers,
        "key_value_heads": config.num_key_value_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "hidden": config.hidden_size,
    }
    key = r"(model\.[^`]*\.(?:bottleneck|prompt|prefix)[^`]*)"
    told = dict(re.findall(rf"\| `{key}` \| (?:`\((.*)\)`|the same) \|", PAGE))
    told["model.language_model.prefix.values"] = told["model.language_model.prefix.keys"]
    told |= {name.replace("self_attn.o_proj", "mlp.down_proj"): shape for name, shape in told.items()}
    told |= {name.replace("layers.0", "layers.1"): shape for name, shape in told.items()}
    part = {"adapter": ".bottleneck.", "prompt": ".embed_tokens.prompt", "prefix": ".prefix."}[method]
    wanted = {n: tuple(sizes[s] for s in shape.split(", ")) for n, shape in told.items() if part in n}
    assert {n: tuple(t.shape) for n, t in load_file(tmp_path / "adapter_model.safetensors").items()} == wanted
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings == {"format": 1} | METHODS[method]


def test_the_documented_way_of_loading_bottlenecks_without_us(checkpoints, examples, tmp_path):
    backbone, adapter = attach(checkpoints, "adapter", dtype=torch.float32)
    adapter.save(tmp_path)
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], names)
    plain = load_backbone(str(checkpoints["qwen2_vl"]), dtype="float32")
    with torch.no_grad():
        base = naive(plain, examples)
        names["add_bottlenecks"](plain.model, tmp_path)
        loss = naive(plain, examples)
        torch.testing.assert_close(loss, naive(backbone, examples), rtol=1e-6, atol=0)
    assert abs(loss - base) > 1e-3


@pytest.mark.parametrize("method", ["adapter", "prompt", "prefix"])
@pytest.mark.parametrize("damage", ["gone", "too many", "shape", "size", "base", "method", "truncated"])
def test_what_does_not_fit_is_refused(checkpoints, tmp_path, method, damage):
    _, adapter = attach(checkpoints, method, dtype=torch.float32)
    adapter.save(tmp_path)
    weights, settings, contract = (
        tmp_path / name for name in ("adapter_model.safetensors", "adapter_config.json", "contract.json")
    )
    tensors = load_file(weights)
    first = sorted(tensors)[0]
    told = "do not match"
    if damage == "gone":
        save_file(
            {name: tensor for name, tensor in tensors.items() if name != first} | {"x": torch.ones(1)},
            weights,
        )
    elif damage == "too many":
        save_file(tensors | {"elsewhere": torch.ones(1)}, weights)
    elif damage == "shape":
        save_file(tensors | {first: torch.ones(*tensors[first].shape, 2)}, weights)
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-5])
        told = "cannot be loaded"
    elif damage == "base":
        contract.write_text(json.dumps(json.loads(contract.read_text()) | {"base_fingerprint": "other"}))
        told = "another base model"
    else:
        change = {"method": "magic"} if damage == "method" else {"bottleneck": "5", "num_virtual_tokens": True}
        settings.write_text(json.dumps(json.loads(settings.read_text()) | change))
        told = "known here are" if damage == "method" else "expected format 1"
    with pytest.raises(AdapterError, match=told):
        load_adapter(load_backbone(str(checkpoints["qwen2_vl"]), dtype="float32"), tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_the_tower_is_frozen_and_the_table_says_what_trains(checkpoints, method):
    _, adapter = attach(checkpoints, method)
    parts = {part.name: part for part in adapter.parts()}
    modules = {name: part.modules for name, part in parts.items()}
    language, merger = "language layers", "merger (projector)"
    linears = {
        "lora": (14, 2),
        "rslora": (14, 2),
        "dora": (14, 2),
        "pissa": (14, 2),
        "language only": (14, 0),
        "projector only": (0, 2),
        "projector's own": (14, 2),
        "vision too": (14, 2),
    }
    wanted = linears.get(method, (4 if method == "adapter" else int(method == "prefix"), 0))
    assert (modules[language], modules[merger]) == wanted
    assert modules["embeddings and head"] == int(method == "prompt")
    tower, asked = parts["vision tower"], method == "vision too"
    assert (tower.modules, tower.trained > 0) == (8 * asked, asked)
    pissa = 2 if METHODS[method].get("variant") == "pissa" else 1  # one half stays as it starts, and is not counted
    tensors = sum(p.numel() for _, p in adapter.named_parameters())
    assert sum(part.trained for part in parts.values()) == tensors // pissa
    base = load_backbone(str(checkpoints["qwen2_vl"])).model
    assert sum(part.frozen for part in parts.values()) == sum(map(torch.numel, base.parameters())) + tensors - (
        tensors // pissa
    )


def test_the_projector_has_its_own_rank_and_scale(checkpoints):
    backbone, _ = attach(checkpoints, "projector's own")
    merger, layer = backbone.model.model.visual.merger.mlp[0], backbone.language_model.layers[0].mlp.up_proj
    found = [(m.r["default"], m.scaling["default"]) for m in (merger, layer)]
    assert found == [(12, pytest.approx(5 / 6)), (8, 2)]  # PiSSA's are twice the rank, one half frozen


@pytest.mark.parametrize("variant", ["plain", "rslora", "dora", "pissa"])
def test_a_rank_of_its_own_leaves_the_projectors_scale_as_it_is(checkpoints, variant):
    backbone = load_backbone(str(checkpoints["qwen2_vl"]))
    attach_adapter(backbone, TrainConfig(data="x", rank=4, projector_rank=8, variant=variant))
    merger, layer = backbone.model.model.visual.merger.mlp[0], backbone.language_model.layers[0].mlp.up_proj
    assert merger.r["default"] == 2 * layer.r["default"]
    assert merger.scaling["default"] == pytest.approx(layer.scaling["default"])


@pytest.mark.parametrize("family", FAMILIES)
def test_with_an_adapted_tower_nothing_is_kept_and_off_is_the_base(checkpoints, examples, tmp_path, family):
    backbone, adapter = attach(checkpoints, "vision too", family)
    fast(backbone, examples, 4096, tmp_path / "cache").backward()
    assert not (tmp_path / "cache").exists()
    assert all(p.grad.any() for n, p in adapter.named_parameters() if n.startswith("model.visual.blocks."))


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "prompt", "variant": "dora"},
        {"method": "adapter", "rank": 4},
        {"method": "prefix", "bottleneck": 4},
        {"num_virtual_tokens": 3},
        {"method": "prompt", "targets": "language"},
        {"method": "prefix", "dropout": 0.1},
        {"method": "adapter", "alpha": 4.0},
        {"method": "adapter", "targets": "vision"},
        {"method": "prompt", "projector_lr": 1e-3},
        {"method": "prefix", "projector_rank": 4},
        {"method": "qlora", "bottleneck": 4},
    ],
)
def test_wrong_combinations_are_refused_in_one_line(wrong):
    with pytest.raises(ConfigError, match=r"belongs to --method .* it has no meaning") as caught:
        TrainConfig(data="x", **wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [{"projector_rank": 4}, {"projector_alpha": 1.0}, {"projector_lr": 1e-3}])
def test_what_is_the_projectors_needs_it_among_the_targets(wrong):
    with pytest.raises(ConfigError, match=r"--projector-\w+ goes with --targets projector") as caught:
        TrainConfig(data="x", targets="language,vision", **wrong)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="expected a finite number above 0"):
        TrainConfig(data="x", **dict.fromkeys(wrong, 0))


@pytest.mark.parametrize(
    "wrong",
    [
        *[{name: float("inf")} for name in ("lr", "alpha", "projector_lr", "projector_alpha")],
        {"lr": float("nan")},
        {"epochs": float("inf")},
        {"weight_decay": float("inf")},
        {"method": "prompt", "num_virtual_tokens": 5000},
    ],
)
def test_numbers_that_cannot_be_used_are_refused(wrong):
    with pytest.raises(
        ConfigError, match=r"--[\w-]+ is (inf|nan|5000); expected (a finite number|fewer than --max-tokens)"
    ):
        TrainConfig(data="x", **wrong)
    assert TrainConfig(data="x", method="prefix", num_virtual_tokens=5000)  # no tokens of a sequence


@pytest.mark.parametrize("targets", ["", "tower", "vision,tower", "language,language", "projector,"])
def test_targets_are_checked(targets):
    with pytest.raises(ConfigError, match="--targets"):
        TrainConfig(data="x", targets=targets or ",")


@pytest.mark.parametrize(("dtype", "off", "alike"), [("bfloat16", 0.02, 0.97), ("float16", 1e-3, 0.999)])
@pytest.mark.parametrize("method", METHODS)
def test_over_a_base_in_sixteen_bits_the_adapter_trains_in_float32(checkpoints, examples, method, dtype, off, alike):
    backbone = load_backbone(str(checkpoints["qwen2_vl"]), dtype=dtype)
    adapter = attach_adapter(backbone, TrainConfig(data="none", **METHODS[method]))
    precise = load_backbone(str(checkpoints["qwen2_vl"]), dtype="float32")
    expected = attach_adapter(precise, TrainConfig(data="none", **METHODS[method]))
    for (_, one), (_, other) in zip(adapter.named_parameters(), expected.named_parameters(), strict=True):
        assert one.dtype == torch.float32
        one.data = other.data.clone()
    loss, wanted = fast(backbone, examples, 4096), fast(precise, examples, 4096)
    assert abs(loss - wanted) < off * wanted
    ours, theirs = gradients(adapter, loss), gradients(expected, wanted)
    together = [torch.cat([g.flatten() for g in grads.values()]) for grads in (ours, theirs)]
    assert torch.cosine_similarity(*together, dim=0) > alike


def test_pissa_starts_as_the_base_from_its_largest_parts_and_one_half_stays(checkpoints, examples):
    base = load_backbone(str(checkpoints["qwen2_vl"]), dtype="float32")
    base.model.double()
    backbone, adapter = attach(checkpoints, "pissa", shaken=False)
    loss = fast(backbone, examples, 4096)
    torch.testing.assert_close(loss, fast(base, examples, 4096), rtol=1e-6, atol=0)
    layer = backbone.language_model.layers[0].mlp.up_proj
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    largest = torch.linalg.matrix_norm(layer.get_base_layer().weight, 2)
    torch.testing.assert_close(torch.linalg.matrix_norm(up[:, :4] @ down[:4] * 2, 2), largest, rtol=1e-5, atol=0)
    for name, grad in gradients(adapter, loss).items():
        learnt, frozen = grad.split(4, dim=0 if ".lora_A." in name else 1)
        assert learnt.any()
        assert not frozen.any()


@pytest.mark.parametrize("wrong", [{"method": "qlora"}, {"weight_decay": 0.1}])
def test_pissa_is_refused_where_it_would_be_wrong(wrong):
    with pytest.raises(ConfigError, match="does not go with"):
        TrainConfig(data="x", variant="pissa", **wrong)
