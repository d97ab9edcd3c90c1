"""Every method through the same line: train, stop, go on exactly, save, load, caption, evaluate, off."""

import json

import pytest
import torch

from tests.model.test_methods import METHODS
from tests.told import Told
from tests.training.test_train import _stop_behind, adapter_of, assert_same, config
from vlm_lora.inference.captioner import Captioner, Decoding
from vlm_lora.inference.evaluate import evaluate
from vlm_lora.model.backbone import load_backbone
from vlm_lora.training.run import train_adapter as train

SHORT = Decoding(max_new_tokens=8)


def method_config(checkpoints, data, output, method: str, **changes):
    own = {
        "dropout": 0.1 if METHODS[method].get("method", "lora") == "lora" else 0.0,
        "lr": 0.3 if method == "prefix" else 3e-2,
    }
    if "rank" not in METHODS[method]:
        own["rank"] = 16  # the default: --rank is LoRA's
    return config(checkpoints, data, output, **own | METHODS[method] | changes)


@pytest.mark.parametrize("method", METHODS)
def test_the_whole_line(checkpoints, photo_folder, tmp_path, method):
    settings = method_config(checkpoints, photo_folder, tmp_path / "run", method)
    result = train(settings, events=(told := Told()))
    warnings = told.warnings
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]
    if method == "vision too":
        assert warnings.pop(0).startswith("LoRA is in the vision tower")
    assert warnings == [], "a tensor has no gradient"

    fresh = load_backbone(str(checkpoints["qwen2_vl"])).model.state_dict()
    now = result.adapter.backbone.model.state_dict()
    now = {n.replace(".base_layer.", ".").replace(".base.", "."): t for n, t in now.items()}
    for name, tensor in fresh.items():
        assert torch.equal(now[name], tensor), f"{name} of the base has changed"

    inside = Captioner(result.adapter.backbone, result.adapter, result.features, settings.prompt)
    loaded = Captioner.load(adapter=tmp_path / "run")
    assert loaded.prompt == settings.prompt
    images = [example.images[0] for example in result.held_out]
    texts = [c.text for c in inside.caption(images, decoding=SHORT)]
    assert [c.text for c in loaded.caption(images, decoding=SHORT)] == texts
    scores = evaluate(loaded, result.held_out, decoding=SHORT).scores
    assert scores.tuned != scores.base
    bare = Captioner.load(str(checkpoints["qwen2_vl"]))
    off = [c.text for c in loaded.caption(images, tuned=False, decoding=SHORT)]
    assert off == [c.text for c in bare.caption(images, decoding=SHORT)]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "lora"])  # lora: test_train.py
def test_resuming_is_bitwise_exact(checkpoints, photo_folder, tmp_path, method):
    wanted = adapter_of(train(method_config(checkpoints, photo_folder, tmp_path / "straight", method)).folder)
    settings = method_config(checkpoints, photo_folder, tmp_path / "stopped", method)
    with pytest.raises(KeyboardInterrupt):
        train(settings, events=_stop_behind(4))
    assert_same(adapter_of(train(settings, resume=True).folder), wanted)
