"""`train DATA --from RUN`: where it begins, what it takes over, what it records, and what it is compared with."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import picture
from vlm_lora import Captioner, TrainConfig, train
from vlm_lora.cli import main
from vlm_lora.config import config_from, inherited, read_yaml
from vlm_lora.data.readers import read_dataset
from vlm_lora.errors import AdapterError, ConfigError
from vlm_lora.inference.evaluate import evaluate
from vlm_lora.model.adapters.base import WEIGHTS, read_contract
from vlm_lora.model.adapters.methods import attach_adapter, load_adapter
from vlm_lora.model.backbone import load_backbone

KINDS = [
    {"rank": 4, "alpha": 12.0, "projector_rank": 2},
    {"rank": 2, "variant": "dora"},
    {"rank": 2, "variant": "pissa"},
    {"method": "adapter", "bottleneck": 4},
    {"method": "prompt", "num_virtual_tokens": 3},
    {"method": "prefix", "num_virtual_tokens": 3},
]


def changed(adapter) -> None:
    for i, (_, parameter) in enumerate(adapter.named_parameters()):
        torch.manual_seed(i)
        parameter.data += 0.1 * torch.randn_like(parameter.data)


@pytest.mark.parametrize("how", KINDS, ids=lambda how: "-".join(map(str, how.values())))
def test_it_begins_with_the_very_tensors_and_trains_them(checkpoints, tmp_path, how):
    model = str(checkpoints["qwen2_vl"])
    parent = attach_adapter(load_backbone(model), TrainConfig(data="none", seed=1, **how))
    changed(parent)
    parent.save(tmp_path / "parent")
    child = attach_adapter(load_backbone(model), TrainConfig(data="none", seed=2, **how))
    own = {name: parameter.detach().clone() for name, parameter in child.named_parameters()}
    with child.as_in(tmp_path / "parent"):
        inside = {name: parameter.detach().clone() for name, parameter in child.named_parameters()}
    wanted = dict(parent.named_parameters())
    assert all(torch.equal(inside[name], wanted[name]) for name in wanted)
    assert all(torch.equal(own[name], parameter) for name, parameter in child.named_parameters())
    child = child.going_on_from("parent", tmp_path / "parent")
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in child.named_parameters())
    assert all(parameter.requires_grad for parameter in wanted.values())
    child.save(tmp_path / "child")
    saved, before = load_file(tmp_path / "child" / WEIGHTS), load_file(tmp_path / "parent" / WEIGHTS)
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], before[name]) for name in saved)
    assert read_contract(tmp_path / "child").parent == "parent"
    assert len(read_contract(tmp_path / "child").parent_fingerprint) == 16
    assert not list(load_adapter(load_backbone(model), tmp_path / "child").named_parameters())  # inference trains none


def test_what_does_not_fit_is_refused(checkpoints, tmp_path):
    parent = attach_adapter(load_backbone(str(checkpoints["qwen2_vl"])), TrainConfig(data="none", rank=4))
    parent.save(tmp_path)
    other = attach_adapter(load_backbone(str(checkpoints["qwen2_vl"])), TrainConfig(data="none", rank=2))
    with pytest.raises(AdapterError, match="do not match"):
        other.going_on_from("x", tmp_path)
    other = attach_adapter(load_backbone(str(checkpoints["qwen2_5_vl"])), TrainConfig(data="none", rank=4))
    with pytest.raises(AdapterError, match="was trained on another base model"):
        other.going_on_from("x", tmp_path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, checkpoints):
    """A run, the data it learnt from, and that of what was corrected."""
    base = tmp_path_factory.mktemp("learn_on")
    for name, word in (("first", "red"), ("second", "blue")):
        (base / name).mkdir()
        for i in range(8):
            picture(i).save(base / name / f"{i}.png")
            (base / name / f"{i}.txt").write_text(f"{word} {i}")
    config = TrainConfig(
        data=str(base / "first"), model=str(checkpoints["qwen2_vl"]), output=str(base / "parent"), rank=4, lr=1e-2,
        prompt="Say it.", max_steps=6, batch_size=4, val_split=0.25, max_pixels=4096,
    )  # fmt: skip
    train(config, eval_images=0)
    return base


def test_a_run_goes_on_from_another_and_is_compared_with_it(runs, capsys):
    command = ["train", str(runs / "second"), "--from", str(runs / "parent"), "--output", str(runs / "child")]
    assert main([*command, "--max-steps", "3", "--lr", "1e-3", "--batch-size", "4", "--val-split", "0.25"]) == 0
    out, _ = capsys.readouterr()
    assert "Against the run that it started from: Too few images to tell this run from that one: on 2 held" in out
    report = (runs / "child" / "report.html").read_text(encoding="utf-8")
    assert "Too few images to tell child from its parent parent: on 2 held-out images" in report
    assert '<th scope="col">child</th><th scope="col">Difference</th>' in report
    assert (runs / "child" / "commonest.json").is_file()
    config = config_from(read_yaml(runs / "child" / "config.yaml"), "config.yaml")
    assert (config.rank, config.prompt, config.max_pixels) == (4, "Say it.", 4096)
    contract = read_contract(runs / "child" / "adapter")
    assert contract.parent == "parent"
    card = (runs / "child" / "adapter" / "README.md").read_text()
    assert f"started from the adapter of the run `parent` (tensors `{contract.parent_fingerprint}`). Against" in card
    # What the comparison gives is what two evaluations give, each by itself.
    dataset = read_dataset(runs / "second", prompt="Say it.")
    told = json.loads((runs / "child" / "against_parent.json").read_text())
    held = {json.loads(x)["example"] for x in (runs / "child" / "predictions.jsonl").read_text().splitlines()}
    examples = [example for example in dataset.examples if example.id in held]
    for who, run in (("base", "parent"), ("tuned", "child")):
        alone = evaluate(Captioner.load(adapter=runs / run), examples).scores.to_json()
        assert told[who] == pytest.approx(alone["tuned"])
    # So does `eval --against`, which asks each with the prompt that it was trained with.
    command = ["eval", str(runs / "second"), "--adapter", str(runs / "child"), "--against", str(runs / "parent")]
    capsys.readouterr()
    assert main([*command, "--json", "--output", str(runs / "out")]) == 0
    told = json.loads(capsys.readouterr().out)["against"]
    assert told["run"] == "parent"
    for who, run in (("base", "parent"), ("tuned", "child")):
        alone = evaluate(Captioner.load(adapter=runs / run), dataset.examples, prompt="Say it.").scores.to_json()
        assert told[who] == pytest.approx(alone["tuned"])
        assert told["tasks"]["captions"]["scores"][who] == pytest.approx(alone["tasks"]["captions"]["scores"]["tuned"])
    assert json.loads((runs / "out" / "against.json").read_text()) == {k: v for k, v in told.items() if k != "run"}
    assert "child from parent" in (runs / "out" / "report.html").read_text(encoding="utf-8")
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "child beside parent:" in out
    assert "training, as " in out  # the commonest answer is that of the run
    assert main([*command[:2], "--against", str(runs / "parent")]) == 2
    assert "--against needs --adapter" in capsys.readouterr().err
    tensors = [load_file(runs / run / "adapter" / WEIGHTS) for run in ("parent", "child")]
    assert any(not torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_the_first_loss_is_the_parents(runs):
    """One step from the parent's tensors: its loss is that of the parent on the new data, not that of a new adapter."""
    how = {"data": str(runs / "first"), "max_steps": 1, "lr": 1e-9, "batch_size": 32, "val_split": 0.0}
    values = inherited({**how, "from_": str(runs / "parent"), "output": str(runs / "one")}, "here")
    train(config_from(values, "here"), eval_images=0)
    train(config_from({**values, "from_": None, "output": str(runs / "none")}, "here"), eval_images=0)
    logs = [(runs / run / "metrics.jsonl").read_text().splitlines() for run in ("parent", "one", "none")]
    last, one, none = ([row["loss"] for row in map(json.loads, log) if "loss" in row] for log in logs)
    assert one[0] < 0.7 * none[0]
    assert abs(one[0] - last[-1]) < abs(one[0] - none[0])


def test_what_the_parent_decides_cannot_be_another(runs, tmp_path, capsys):
    command = ["train", str(runs / "second"), "--from", str(runs / "parent"), "--output", str(tmp_path / "x")]
    assert main([*command, "--rank", "8"]) == 2
    assert "--rank is 8, and 4 in " in capsys.readouterr().err
    assert main([*command, "--method", "prefix"]) == 2
    assert "--method is 'prefix', and 'lora' in " in capsys.readouterr().err
    assert main(["train", str(runs / "second"), "--from", str(tmp_path)]) == 2
    assert "expected a run folder, with config.yaml and adapter in it" in capsys.readouterr().err
    values = {"data": "x", "from": str(runs / "parent"), "alpha": 8.0}  # what twice the rank comes to
    assert config_from(inherited(values, "here"), "here").from_ == str(runs / "parent")
    with pytest.raises(ConfigError, match=r"--alpha is 3\.0, and None"):
        inherited(values | {"alpha": 3.0}, "here")
