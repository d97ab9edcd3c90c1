"""Adapter folders that another tool wrote, or that were damaged: loaded as PEFT loads them, or refused in one line.

Run: pytest tests/model/test_foreign.py
"""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.conftest import picture
from vlm_lora.config import TrainConfig
from vlm_lora.data.images import load_image
from vlm_lora.errors import AdapterError
from vlm_lora.inference.captioner import Captioner, Decoding
from vlm_lora.inference.export import merge
from vlm_lora.model.adapters.methods import attach_adapter
from vlm_lora.model.backbone import load_backbone

SHORT = Decoding(max_new_tokens=12)
DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.fixture(params=["lora", "prompt"])
def folder(checkpoints, tmp_path, request):
    config = TrainConfig(data="none", method=request.param)
    attach_adapter(load_backbone(str(checkpoints["qwen2_vl"])), config).save(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("file", ["adapter_config.json", "contract.json"])
@pytest.mark.parametrize("text", ["[1]", "null", DEEP, "{"], ids=["list", "null", "deep", "cut off"])
def test_what_is_no_json_object_is_refused_in_one_line(folder, file, text):
    (folder / file).write_text(text)
    with pytest.raises(AdapterError, match=rf"{file}: (holds|cannot be read)") as caught:
        Captioner.load(adapter=folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"min_pixels": "a"}, {"max_pixels": True}, {"base": 5}, {"prompt": None}, {"base_fingerprint": [1]}, {"more": 1}],
)
def test_a_contract_of_other_types_is_refused_in_one_line(folder, change):
    contract = json.loads((folder / "contract.json").read_text())
    (folder / "contract.json").write_text(json.dumps(contract | change))
    with pytest.raises(AdapterError, match=rf"contract\.json: is not a contract .*{next(iter(change))} is") as caught:
        Captioner.load(adapter=folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("folder", ["lora"], indirect=True)
@pytest.mark.parametrize(
    "change", [{"target_modules": "("}, {"rank_pattern": [1]}, {"r": "x"}, {"modules_to_save": ["lm_head"]}]
)
def test_a_configuration_that_peft_cannot_use_is_refused_in_one_line(folder, change):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(AdapterError, match="cannot be loaded") as caught:
        Captioner.load(adapter=folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "names", [["lm_head"], ["embed_tokens", "norm"], ["merger"], ["patch_embed"]], ids=lambda names: names[0]
)
def test_modules_that_peft_saved_whole_are_used(checkpoints, tmp_path, names):
    """Also one of the tower, whose features must not come from the base's cache then."""
    base = AutoModelForImageTextToText.from_pretrained(checkpoints["qwen2_vl"], dtype=torch.float32)
    settings = LoraConfig(r=4, target_modules=r".*language_model\..*\.[qv]_proj", modules_to_save=names)
    theirs = get_peft_model(base, settings).eval()
    for i, (_, parameter) in enumerate(theirs.named_parameters()):
        torch.manual_seed(i)
        parameter.data += torch.randn_like(parameter) * 0.2 * parameter.requires_grad
    theirs.save_pretrained(tmp_path)
    assert any(names[0] in name for name in load_file(tmp_path / "adapter_model.safetensors"))

    picture(3).save(tmp_path / "image.png")
    ours = Captioner.load(str(checkpoints["qwen2_vl"]), tmp_path)
    processor = ours.backbone.processor
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[load_image(tmp_path / "image.png")], return_tensors="pt")
    answer = theirs.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    answer = [token for token in answer if token not in ours.backbone.eos_token_ids]
    plain = Captioner.load(str(checkpoints["qwen2_vl"])).answer(tmp_path / "image.png", "What?", decoding=SHORT)
    assert ours.answer(tmp_path / "image.png", "What?", decoding=SHORT) == ours.encoder.decode(answer) != plain
    assert ours.answer(tmp_path / "image.png", "What?", tuned=False, decoding=SHORT) == plain
    with pytest.raises(AdapterError, match=rf"{names[0]} is replaced as a whole"):
        merge(tmp_path, tmp_path / "merged", model=str(checkpoints["qwen2_vl"]))
