"""What tells one base model from another, and which folders are not loaded at all."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model.test_qlora import needs_bitsandbytes
from vlm_lora.config import TrainConfig
from vlm_lora.errors import AdapterError, ConfigError, ModelError
from vlm_lora.inference.export import merged_weights
from vlm_lora.model.adapters.methods import attach_adapter, load_adapter
from vlm_lora.model.backbone import load_backbone
from vlm_lora.model.device import is_out_of_memory, resolve_dtype
from vlm_lora.model.folder import LAYOUTS, check_model_folder, fingerprint


@pytest.fixture
def base(checkpoints, tmp_path):
    return shutil.copytree(checkpoints["qwen2_vl"], tmp_path / "base")


@needs_bitsandbytes
def test_however_it_is_loaded_a_base_is_the_same(base):
    told = {load_backbone(str(base), dtype=d).base_fingerprint for d in ("float32", "bfloat16")}
    told.add(load_backbone(str(base), quantise=True).base_fingerprint)
    assert told == {fingerprint(base)}


@pytest.mark.parametrize("change", ["newer names", "shards", "wider", "a head of its own", "a draft", "buffers"])
def test_however_it_is_stored_a_base_is_the_same(base, change):
    whole = base / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(whole).items()}
    save_file(tensors, whole)
    before = fingerprint(base)
    if change == "newer names":
        assert {"visual.merger.mlp.0.weight", "model.layers.0.mlp.up_proj.weight"} < tensors.keys()
        tensors = {re.sub("^model", "model.language_model", name): tensor for name, tensor in tensors.items()}
        tensors = {re.sub("^visual", "model.visual", name): tensor for name, tensor in tensors.items()}
    elif change == "wider":
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
    elif change == "a draft":
        tensors["mtp.fc.weight"] = torch.ones(4, 4)
    elif change == "buffers":
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    elif change == "a head of its own" and tensors.pop("lm_head.weight", None) is None:
        tensors["lm_head.weight"] = torch.ones(4, 4)
    if change != "shards":
        save_file(tensors, whole)
    else:
        whole.unlink()
        names = sorted(tensors)
        for i in range(3):
            save_file({name: tensors[name] for name in names[i::3]}, base / f"{i}.safetensors")
        weight_map = {name: f"{i}.safetensors" for i in range(3) for name in names[i::3]}
        (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        save_file({"model.norm.weight": torch.ones(3)}, base / "of_something_else.safetensors")
    assert fingerprint(base) == before


@pytest.mark.parametrize("targets", ["language", "projector", "vision"])
def test_a_base_with_an_adapter_merged_into_it_is_another_and_is_told_apart(base, tmp_path, targets):
    """Negative control: of rank 1, after what a single step moves; every weight that it touches tells."""
    backbone = load_backbone(str(base))
    adapter = attach_adapter(backbone, TrainConfig(data="x", rank=1, targets=targets))
    for name, parameter in adapter.named_parameters():
        if ".lora_B." in name:
            parameter.data += 2e-4
    adapter.save(tmp_path / "adapter")
    assert load_adapter(load_backbone(str(base)), tmp_path / "adapter")
    before, plain, merged = fingerprint(base), load_file(base / "model.safetensors"), dict(merged_weights(adapter))
    assert len(merged) > 1
    stored = {LAYOUTS.sub("", name): name for name in plain}
    for name, weight in merged.items():
        save_file(plain | {stored[LAYOUTS.sub("", name)]: weight}, base / "model.safetensors")
        now = fingerprint(base)
        assert now[:32] == before[:32]
        assert now != before, name
    with pytest.raises(AdapterError, match=r"another base model .* the same sizes but other weights, as after a merge"):
        load_adapter(load_backbone(str(base)), tmp_path / "adapter")


def test_a_base_of_other_sizes_is_called_so(checkpoints, base, tmp_path):
    attach_adapter(load_backbone(str(checkpoints["qwen2_5_vl"])), TrainConfig(data="x")).save(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"another base model .*qwen2_5_vl\) than .*base, which has other layers\."):
        load_adapter(load_backbone(str(base)), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "[]", r"config\.json: holds '\[\]'; expected"),
        ("config.json", "null", r"config\.json: holds 'None'; expected"),
        ("config.json", "{", r"config\.json: cannot be read"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: holds '\[\]'; expected"),
        ("model.safetensors.index.json", "[]", r"index\.json: holds '\[\]'; expected"),
        ("model.safetensors.index.json", '{"weight_map": []}', r"index\.json: weight_map is '\[\]'; expected"),
        (
            "config.json",
            '{"model_type": "qwen3_5_moe"}',
            r"is a model of another family \(model_type 'qwen3_5_moe'\)\. Expected one of qwen2_vl, .*, qwen3_5, such",
        ),
        ("adapter_config.json", "{}", r"holds an adapter too \(adapter_config\.json\).*--adapter"),
    ],
)
def test_a_folder_that_is_not_a_plain_base_is_refused_in_one_line(base, file, text, message):
    (base / file).write_text(text)
    with pytest.raises(ModelError, match=message) as refused:
        check_model_folder(base, str(base))
    assert "\n" not in str(refused.value)


def test_bfloat16_is_refused_where_the_device_cannot_do_it(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GeForce GTX 750")
    with pytest.raises(ConfigError, match="--dtype bfloat16: GeForce GTX 750 cannot compute in it"):
        resolve_dtype("bfloat16", gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (5, 0))
    capability = {"a GTX 750": (5, 0), "a T4": (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability["a GTX 750"])
    assert resolve_dtype("auto", gpu) == resolve_dtype("float32", gpu) == torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability["a T4"])
    assert resolve_dtype("auto", gpu) == resolve_dtype("float16", gpu) == torch.float16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))  # a T4
    assert resolve_dtype("auto", gpu) == resolve_dtype("float16", gpu) == torch.float16
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert resolve_dtype("auto", gpu) == resolve_dtype("bfloat16", gpu) == torch.bfloat16


def test_a_cpu_without_memory_is_known_as_such():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
