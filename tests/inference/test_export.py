"""Merged checkpoints: what the adapter says is what plain transformers says with them; and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.conftest import TINY, picture
from tests.model.test_methods import METHODS
from tests.model.test_qlora import needs_bitsandbytes
from vlm_lora.cli import main
from vlm_lora.config import TrainConfig
from vlm_lora.errors import AdapterError, ConfigError, ModelError
from vlm_lora.inference import export
from vlm_lora.inference.captioner import Captioner, Decoding
from vlm_lora.inference.export import merge
from vlm_lora.model.adapters.methods import attach_adapter
from vlm_lora.model.backbone import load_backbone

PICTURES = [picture(i, size) for i, size in enumerate([(64, 64), (96, 48), (32, 80)])]
SHORT = Decoding(max_new_tokens=8)


def make_adapter(model, folder, *, by: float = 0.2, **settings):
    """A saved adapter, each tensor moved by noise from where it starts."""
    config = TrainConfig(data="none", **settings)
    backbone = load_backbone(str(model), dtype="float32", quantise=config.method == "qlora")
    adapter = attach_adapter(backbone, config)
    for i, (_, parameter) in enumerate(adapter.named_parameters()):
        torch.manual_seed(i)
        parameter.data += torch.randn_like(parameter.data) * by
    adapter.save(folder)
    return folder


def plain_captions(folder) -> list[str]:
    """As transformers' documentation has it; nothing of ours."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": "Describe this image."}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    captions = []
    for image in PICTURES:
        inputs = processor(text=[text], images=[image], return_tensors="pt")
        said = model.generate(**inputs, do_sample=False, max_new_tokens=8, num_beams=1)
        captions += processor.batch_decode(said[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [caption.strip() for caption in captions]


@pytest.mark.parametrize(
    ("method", "family"),
    [
        *[(variant, "qwen2_vl") for variant in ("lora", "rslora", "dora", "pissa")],
        *[("vision too", family) for family in ("qwen2_5_vl", "qwen3_vl", "qwen3_5")],
    ],
)
def test_merged_says_what_the_adapter_says(checkpoints, tmp_path, method, family):
    adapter = make_adapter(checkpoints[family], tmp_path / "adapter", **METHODS[method])
    merged = merge(adapter, tmp_path / "out")
    assert (merged.folder, merged.dtype) == (tmp_path / "out", "float32")
    assert merged.effect > 0.05
    assert merged.error < 1e-5
    assert all(tuned == again for tuned, again in merged.captions)
    assert not list(tmp_path.glob(".out*"))
    modes = {file.stat().st_mode for folder in (adapter, merged.folder) for file in folder.iterdir()}
    assert len(modes) == 1, "who may read the configs may read the weights: an engine is often another user"
    tuned, plain = Captioner.load(adapter=adapter), Captioner.load(str(tmp_path / "out"))
    said = [c.text for c in tuned.caption(PICTURES, decoding=SHORT)]
    assert [c.text for c in plain.caption(PICTURES, decoding=SHORT)] == said
    assert [c.text for c in tuned.caption(PICTURES, tuned=False, decoding=SHORT)] != said
    base, ours = (set(load_file(folder / "model.safetensors")) for folder in (checkpoints[family], tmp_path / "out"))
    assert base == ours, "other names than the base's, so another tool may not find them"
    # transformers' own names inside; the hub's checkpoints have others, but for Qwen3-VL's and Qwen3.5's
    assert any(name.startswith("model.language_model.") for name in ours) == family.startswith("qwen3")


@pytest.mark.parametrize("settings", [{"rank": 4}, pytest.param({"method": "qlora"}, marks=needs_bitsandbytes)])
def test_plain_transformers_gives_the_same_captions(tmp_path, settings):
    adapter = make_adapter("tiny", tmp_path / "adapter", by=0.15, **settings)
    merged = merge(adapter, tmp_path / "out", dtype="float32")
    assert merged.dequantised == ("method" in settings)
    assert merged.error < 1e-5
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    tuned = Captioner.load(adapter=adapter)
    wanted = [c.text for c in tuned.caption(PICTURES, decoding=SHORT)]
    assert plain_captions(tmp_path / "out") == wanted
    assert plain_captions(TINY) != wanted


def test_a_merged_template_says_by_itself_what_it_was_told_in_training(checkpoints, tmp_path, caplog):
    """Of a base that thinks before it answers unless it is told not to."""
    wanted, folder = [], checkpoints["qwen3_5"]
    for name in ("out", "again"):
        adapter = make_adapter(folder, tmp_path / f"{name}-adapter", rank=4)
        merge(adapter, tmp_path / name)
        wanted = [c.text for c in Captioner.load(adapter=adapter).caption(PICTURES, decoding=SHORT)]
        assert plain_captions(tmp_path / name) == wanted
        template = (tmp_path / name / "chat_template.jinja").read_text()
        assert template.startswith("{%- set enable_thinking = false and enable_thinking %}\n")
        assert template.count("set enable_thinking") == 1
        assert "Kwargs" not in caplog.text  # transformers looks for options by their names in the template
        folder = tmp_path / name
    (folder / "chat_template.jinja").write_text(template.partition("\n")[2])
    assert plain_captions(folder) != wanted  # negative control


def test_a_draft_of_further_tokens_is_left_out_and_said(checkpoints, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(checkpoints["qwen3_5"], base)
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {"mtp.fc.weight": torch.ones(4, 4)}, base / "model.safetensors", metadata={"format": "pt"})
    adapter, told = make_adapter(base, tmp_path / "adapter", rank=4), []
    merge(adapter, tmp_path / "out", report=told.append)
    assert any("(mtp.*) is left out" in line for line in told)
    assert load_file(tmp_path / "out/model.safetensors").keys() == tensors.keys()
    merge(adapter, tmp_path / "other", model=str(checkpoints["qwen3_5"]), report=told.append)  # the same base
    assert sum("left out" in line for line in told) == 1


def test_the_number_format_of_the_base_is_kept(tmp_path):
    adapter = make_adapter("tiny", tmp_path / "adapter", by=0.05, rank=4)
    merged = merge(adapter, tmp_path / "out")
    assert merged.dtype == "bfloat16"
    assert 1e-5 < merged.error < 0.05 < merged.effect
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    base = load_file(TINY / "model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], tensors[name])}
    assert len(changed) == 4 * 7 + 2  # the linears of the language layers and the projector's, nothing else
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_an_adapter_without_effect_is_an_error(checkpoints, tmp_path):
    adapter = make_adapter(checkpoints["qwen2_vl"], tmp_path / "adapter", by=0.0, rank=4)
    with pytest.raises(AdapterError, match="has no effect"):
        merge(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", ["a layer is lost", "half the scale"])
def test_a_wrong_merge_is_an_error_and_leaves_nothing(checkpoints, tmp_path, monkeypatch, fault):
    adapter = make_adapter(checkpoints["qwen2_vl"], tmp_path / "adapter", rank=4)
    right = export.merged_weights

    def wrong(attached):
        for name, weight in list(right(attached))[1:]:
            base = attached.backbone.model.get_submodule(name.removesuffix(".weight")).base_layer.weight
            yield name, (weight + base) / 2 if fault == "half the scale" else weight

    monkeypatch.setattr(export, "merged_weights", wrong)
    with pytest.raises(ModelError, match=r"does not do what the adapter does.*Nothing was written"):
        merge(adapter, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_change_that_rounding_takes_away_is_an_error(tmp_path):
    adapter = make_adapter("tiny", tmp_path / "adapter", by=1e-4, rank=4)
    with pytest.raises(ModelError, match="Try --dtype float32"):
        merge(adapter, tmp_path / "out")


@pytest.mark.parametrize("method", ["adapter", "prompt", "prefix"])
def test_what_is_no_change_of_weights_is_refused(checkpoints, tmp_path, method, monkeypatch):
    adapter = make_adapter(checkpoints["qwen2_vl"], tmp_path / "adapter", method=method)
    monkeypatch.setattr(Captioner, "load", None)  # refused before anything is loaded
    with pytest.raises(AdapterError, match=f"--method {method} adds to the model") as caught:
        merge(adapter, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_folder_in_use_is_refused(checkpoints, tmp_path, monkeypatch):
    adapter = make_adapter(checkpoints["qwen2_vl"], tmp_path / "adapter", rank=4)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("precious")
    monkeypatch.setattr(Captioner, "load", None)
    with pytest.raises(ConfigError, match="not empty"):
        merge(adapter, tmp_path / "out")
    assert (tmp_path / "out/mine.txt").read_text() == "precious"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ConfigError, match="is the folder you are in"):
        merge(adapter, ".")


def test_on_the_command_line(checkpoints, tmp_path, capsys):
    adapter = make_adapter(checkpoints["qwen2_vl"], tmp_path / "adapter", rank=4)
    PICTURES[0].save(tmp_path / "one.png")
    assert main(["merge", str(adapter), str(tmp_path / "out"), "--images", str(tmp_path / "one.png")]) == 0
    told = capsys.readouterr()
    assert told.out == f"{tmp_path / 'out'}\n"
    assert "1 of 1 captions are the same" in told.err


CONVERTER = """#!/usr/bin/env python3
# Stands where llama.cpp's converter does; what is checked here is how it is called. bench.engines runs the real one.
import json, pathlib, sys
merged, *flags = sys.argv[1:]
if "broken" in merged:
    sys.exit("Model NoSuchModel is not supported")
pathlib.Path(flags[flags.index("--outfile") + 1]).write_text(json.dumps(flags))
"""


def test_gguf_by_the_converter_on_the_path(checkpoints, tmp_path, capsys, monkeypatch):
    adapter = make_adapter(checkpoints["qwen2_vl"], tmp_path / "adapter", rank=4)
    command = ["merge", str(adapter), str(tmp_path / "out"), "--gguf"]
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert main(command) == 2
    assert "there is no convert_hf_to_gguf.py on the PATH" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/convert_hf_to_gguf.py"
    program.write_text(CONVERTER)
    program.chmod(0o755)
    assert main(command) == 0
    told = capsys.readouterr()
    folder, model, tower = (Path(line) for line in told.out.splitlines())
    assert (folder, model.name, tower.name) == (tmp_path / "out", "out-F16.gguf", "mmproj-out-F16.gguf")
    assert json.loads(model.read_text())[2:] == ["--outtype", "f16"]
    assert json.loads(tower.read_text())[2:] == ["--outtype", "f16", "--mmproj"]
    assert "--image-min-tokens 4 --image-max-tokens 36" in told.err  # of 32 x 32 to 96 x 96 pixels, 16 x 16 a token
    command[2] = str(tmp_path / "broken")
    assert main(command) == 1
    assert "convert_hf_to_gguf.py: Model NoSuchModel is not supported. " in capsys.readouterr().err
    assert (tmp_path / "broken/model.safetensors").is_file()
