"""A run from a folder on disk to an adapter that plain PEFT loads; resuming; what is refused."""

import json
import re
import shlex
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import picture
from tests.told import Listener
from vlm_lora.cli import main
from vlm_lora.config import TrainConfig, cache_folder
from vlm_lora.errors import AdapterError, CheckpointError, ConfigError, DataError
from vlm_lora.model.adapters.methods import load_adapter
from vlm_lora.model.backbone import Backbone, load_backbone
from vlm_lora.model.families import FAMILIES
from vlm_lora.model.features import FeatureCache, store_in
from vlm_lora.training import loop
from vlm_lora.training import step as one_step
from vlm_lora.training.run import train_adapter as train


def config(checkpoints, data, output, **changes) -> TrainConfig:
    settings = {"rank": 4, "epochs": 3, "batch_size": 4, "lr": 1e-2, "val_split": 0.2, "save_every": 3, "dropout": 0.1}
    settings |= {"model": str(checkpoints["qwen2_vl"]), "data": str(data), "output": str(output)} | changes
    return TrainConfig(**settings)


def adapter_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize(
    ("family", "linears", "mergers"),
    [("qwen2_vl", 2 * 7, 1), ("qwen2_5_vl", 2 * 7, 1), ("qwen3_vl", 3 * 7, 3), ("qwen3_5", 3 * 8 + 7, 1)],
)
def test_a_run_trains_lora_and_nothing_else(checkpoints, photo_folder, tmp_path, family, linears, mergers):
    told = {}
    settings = config(checkpoints, photo_folder, tmp_path / "run", model=str(checkpoints[family]))
    result = train(settings, events=Listener(lambda kind, **v: told.setdefault(kind, v)))
    assert (len(result.train_examples), len(result.held_out)) == (10, 2)
    assert result.steps == 8

    fresh = load_backbone(str(checkpoints[family])).model.state_dict()
    trained = {n.replace(".base_layer.", "."): t for n, t in result.adapter.backbone.model.state_dict().items()}
    for name, tensor in fresh.items():
        assert torch.equal(trained[name], tensor), f"{name} of the base has changed"
    lora = {name: tensor for name, tensor in trained.items() if "lora_" in name}
    assert len(lora) == 2 * (linears + mergers * 2)
    for name, tensor in lora.items():
        if "lora_B" in name:
            assert tensor.any(), f"{name} has not moved"

    parts = {part.name: part for part in told["parts"]["adapter"].parts()}
    assert parts["vision tower"].trained == 0
    assert parts["language layers"].modules == linears
    assert parts["merger (projector)"].modules == mergers * 2
    assert "warning" not in told

    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    assert steps[-1]["lr"] < steps[2]["lr"]
    assert [line["step"] for line in lines if "held_out_loss" in line] == [3, 6, 8]
    for name in ("adapter/adapter_config.json", "adapter/contract.json", "config.yaml", "checkpoints/step-000008"):
        assert (tmp_path / "run" / name).exists(), name


def test_every_lora_a_has_moved_too(checkpoints, photo_folder, tmp_path):
    short = train(config(checkpoints, photo_folder, tmp_path / "one", max_steps=1, dropout=0.0, epochs=1))
    before = {n: p.detach().clone() for n, p in short.adapter.named_parameters()}
    long = train(config(checkpoints, photo_folder, tmp_path / "all", dropout=0.0))
    for name, tensor in long.adapter.named_parameters():
        assert not torch.equal(tensor, before[name]), f"{name} has not moved"


def test_the_projector_learns_at_its_own_rate(checkpoints, photo_folder, tmp_path):
    """AdamW's first step moves what has a gradient by the learning rate, from LoRA's zeros."""
    settings = {"max_steps": 1, "warmup": 0.0, "dropout": 0.0, "lr": 1e-3, "projector_lr": 1e-2}
    tensors = adapter_of(train(config(checkpoints, photo_folder, tmp_path / "run", **settings)).folder)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            expected = 1e-2 if ".merger." in name else 1e-3
            assert tensor.abs().max().item() == pytest.approx(expected, rel=1e-3), name


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "qwen3_5"])
def test_plain_peft_loads_the_adapter(checkpoints, photo_folder, tmp_path, family):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    result = train(config(checkpoints, photo_folder, tmp_path / "run", model=str(checkpoints[family])))
    base = AutoModelForImageTextToText.from_pretrained(checkpoints[family], dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, tmp_path / "run/adapter").eval()
    ours = load_backbone(str(checkpoints[family]))
    adapter = load_adapter(ours, tmp_path / "run/adapter")

    text = ours.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
        add_generation_prompt=True,
    )
    inputs = ours.processor(text=[text], images=[picture(3)], return_tensors="pt")
    with torch.no_grad():
        trained = result.adapter.backbone.model(**inputs).logits
        torch.testing.assert_close(plain(**inputs).logits, trained, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.model(**inputs).logits, trained, rtol=1e-5, atol=1e-5)
        with adapter.switched_off():
            without = ours.model(**inputs).logits
        unloaded = plain.unload()(**inputs).logits
    torch.testing.assert_close(without, unloaded, rtol=1e-5, atol=1e-5)
    assert (trained - without).abs().max() > 1e-2  # the adapter does something


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"nothing\.of\.this\.name", "No linear layer of the projector was found"),
        (r"model\.visual\.(?:merger\.mlp\.0|blocks\.\d+\.attn\.proj)", r"must not, first model\.visual\.blocks"),
    ],
)
def test_a_run_fails_if_a_target_is_empty_or_the_tower_would_train(
    checkpoints, photo_folder, tmp_path, monkeypatch, pattern, message
):
    monkeypatch.setitem(FAMILIES["qwen2_vl"].linears, "projector", pattern)
    with pytest.raises(AdapterError, match=message):
        train(config(checkpoints, photo_folder, tmp_path / "run"))


@pytest.fixture
def adapter_folder(checkpoints, photo_folder, tmp_path):
    train(config(checkpoints, photo_folder, tmp_path / "run", max_steps=1))
    return tmp_path / "run/adapter"


def test_an_adapter_loads_on_its_base_in_another_number_format(checkpoints, adapter_folder):
    """Trained in float32 on a CPU, used in bfloat16 on a GPU: it is the same base."""
    backbone = load_backbone(str(checkpoints["qwen2_vl"]), dtype="bfloat16")
    assert load_adapter(backbone, adapter_folder).contract.dtype == "float32"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("a tensor is gone", "do not match"),
        ("a tensor too many", "do not match"),
        ("another base", "another base model"),
        ("megatron", "refused"),
        ("not lora", "expected 'LORA'"),
        ("truncated", "cannot be loaded"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(checkpoints, adapter_folder, damage, message):
    weights, settings = adapter_folder / "adapter_model.safetensors", adapter_folder / "adapter_config.json"
    if damage == "a tensor is gone":
        tensors = load_file(weights)
        tensors.pop(sorted(tensors)[0])
        save_file(tensors, weights)
    elif damage == "a tensor too many":
        tensors = load_file(weights)
        save_file(tensors | {"base_model.model.model.elsewhere.lora_A.weight": torch.zeros(4, 4)}, weights)
    elif damage == "another base":
        contract = json.loads((adapter_folder / "contract.json").read_text())
        (adapter_folder / "contract.json").write_text(json.dumps(contract | {"base_fingerprint": "0"}))
    elif damage in ("megatron", "not lora"):
        change = {"megatron_config": {"a": 1}} if damage == "megatron" else {"peft_type": "IA3"}
        settings.write_text(json.dumps(json.loads(settings.read_text()) | change))
    else:
        weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(AdapterError, match=message):
        load_adapter(load_backbone(str(checkpoints["qwen2_vl"])), adapter_folder)


@pytest.mark.parametrize(
    ("family", "changes", "stops"),
    [
        ("qwen2_vl", {}, range(1, 9)),
        ("qwen2_vl", {"micro_batch_tokens": 60, "cache": False}, (2, 5)),
        pytest.param(
            "qwen3_5", {"micro_batch_tokens": 60, "gradient_checkpointing": True}, (3,), marks=pytest.mark.long
        ),
    ],
    ids=["plain", "accumulated", "recurrent"],
)
def test_resuming_is_bitwise_exact(checkpoints, photo_folder, tmp_path, monkeypatch, family, changes, stops):
    """Stopped after these steps in turn, and each time resumed: the adapter is that of the run never stopped."""
    changes = changes | {"model": str(checkpoints[family])}
    passes, real = [], one_step.loss_sum
    with monkeypatch.context() as patch:
        patch.setattr(one_step, "loss_sum", lambda *args: passes.append(1) or real(*args))
        straight = train(config(checkpoints, photo_folder, tmp_path / "straight", save_every=1, val_split=0, **changes))
    assert straight.steps == 9
    assert (len(passes) > 2 * straight.steps) == ("micro_batch_tokens" in changes), (
        "steps are not cut up as they should be"
    )

    settings = config(checkpoints, photo_folder, tmp_path / "stopped", save_every=1, val_split=0, **changes)
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            train(settings, resume=stop > stops[0], events=_stop_behind(stop))
    shutil.rmtree(tmp_path / "straight/checkpoints")
    resumed = train(settings, resume=True)
    assert_same(adapter_of(resumed.folder), adapter_of(straight.folder))

    def steps(folder):
        return [
            json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines() if "lr" in line
        ]

    assert steps(resumed.folder) == steps(straight.folder) == list(range(1, 10))


def _stop_behind(step: int):
    def report(kind, **values):
        if kind == "step" and values["step"] == step + 1:  # checkpoint of `step` is written, the next step is lost
            raise KeyboardInterrupt

    return Listener(report)


def test_without_the_steps_seed_resuming_would_differ(checkpoints, photo_folder, tmp_path, monkeypatch):
    """Negative control: dropout drawn from wherever the generator stands is not the resumed run's."""
    assert len({loop._step_seed(seed, step) for seed in range(3) for step in range(50)}) == 150
    real = torch.manual_seed
    # An adapter starts from the run's own seed, 0, which stays.
    monkeypatch.setattr(torch, "manual_seed", lambda seed: real(seed) if seed == 0 else None)

    def run(name, **how) -> dict[str, torch.Tensor]:
        real(1)
        return adapter_of(train(config(checkpoints, photo_folder, tmp_path / name, save_every=1), **how).folder)

    one = run("one")
    assert_same(one, run("two"))
    with pytest.raises(KeyboardInterrupt):
        run("stopped", events=_stop_behind(4))
    resumed = run("stopped", resume=True)
    assert any(not torch.equal(one[name], resumed[name]) for name in one)


def test_cache_and_no_cache_give_the_same_adapter(checkpoints, photo_folder, tmp_path):
    filled = train(config(checkpoints, photo_folder, tmp_path / "filling"))
    read = train(config(checkpoints, photo_folder, tmp_path / "reading"))
    without = train(config(checkpoints, photo_folder, tmp_path / "without", cache=False))
    assert (filled.features.computed, read.features.computed, without.features.computed) == (12, 0, 12)
    assert_same(adapter_of(filled.folder), adapter_of(read.folder))
    assert_same(adapter_of(filled.folder), adapter_of(without.folder))


def test_what_is_not_cached_is_computed_in_the_step_with_the_same_result(checkpoints, photo_folder, tmp_path):
    """No room, half of the room, each image seen once: the adapter is the one of the run with a full cache."""
    told = []

    def run(name, **changes):
        settings = config(checkpoints, photo_folder, tmp_path / name, **changes)
        result = train(
            settings, events=Listener(lambda kind, **v: told.append((name, v)) if kind == "survey" else None)
        )
        return adapter_of(result.folder), result.features

    wanted, _ = run("full")
    for path in (cache_folder() / "features").rglob("*.safetensors"):
        path.unlink()
    none, features = run("none", cache_gb=1e-9)
    assert (features.computed, store_in(cache_folder()).use().entries) == (12, 0)
    half, features = run("half", cache_gb=60_000 / 1e9)
    assert 0 < store_in(cache_folder()).use().entries < 10
    assert_same(none, wanted)
    assert_same(half, wanted)

    cached, _ = run("cached once", epochs=1, cache_gb=1)
    for path in (cache_folder() / "features").rglob("*.safetensors"):
        path.unlink()
    once, features = run("once", epochs=1)
    assert store_in(cache_folder()).use().entries == 2  # the held-out ones
    assert features.computed == 12
    assert_same(once, cached)
    room = {name: v["survey"].room for name, v in told if not v["seen_once"]}
    assert room["none"] <= 1 < room["half"]
    assert [v["seen_once"] for name, v in told if name == "once"] == [False, True]


def test_with_a_full_cache_the_tower_is_parked_and_not_used(checkpoints, photo_folder, tmp_path, monkeypatch):
    wanted = adapter_of(train(config(checkpoints, photo_folder, tmp_path / "one")).folder)
    monkeypatch.setattr(
        Backbone, "park_tower", lambda self, device="meta", real=Backbone.park_tower: real(self, device)
    )
    result = train(config(checkpoints, photo_folder, tmp_path / "two"))
    visual = result.adapter.backbone.model.model.visual
    assert {p.device.type for p in visual.blocks.parameters()} == {"meta"}
    assert_same(adapter_of(result.folder), wanted)


def test_the_next_step_is_fetched_while_this_one_computes():
    fetched = []
    steps = loop._ahead(lambda step: fetched.append(step) or step, range(3, 6))
    assert next(steps) == 3
    for _ in range(200):
        if fetched == [3, 4]:
            break
        time.sleep(0.01)
    assert fetched == [3, 4]
    assert list(steps) == [4, 5]
    assert list(loop._ahead(str, range(4, 4))) == []
    with pytest.raises(ZeroDivisionError):
        list(loop._ahead(lambda step: 1 // (2 - step), range(4)))


def test_an_image_that_disappears_while_training_is_named(checkpoints, photo_folder, tmp_path):
    def report(kind, **values):
        if kind == "start":
            for path in photo_folder.glob("*.png"):
                path.unlink()

    with pytest.raises(DataError, match=r"\.png' cannot be opened"):
        train(config(checkpoints, photo_folder, tmp_path / "run", cache=False), events=Listener(report))


def test_a_damaged_checkpoint_is_set_aside(checkpoints, photo_folder, tmp_path):
    settings = config(checkpoints, photo_folder, tmp_path / "run", keep_checkpoints=3)
    wanted = adapter_of(train(settings).folder)
    newest = tmp_path / "run/checkpoints/step-000008/optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-9] + b"\x00" * 9)
    told = []
    train(settings, resume=True, events=Listener(lambda kind, **v: told.append((kind, v))))
    assert_same(adapter_of(tmp_path / "run"), wanted)
    assert next(v["text"] for k, v in told if k == "warning").startswith("step-000008 is damaged")
    assert [v["step"] for k, v in told if k == "start"] == [6]


def test_a_changed_caption_or_setting_is_not_gone_on_with(checkpoints, photo_folder, tmp_path):
    train(config(checkpoints, photo_folder, tmp_path / "run"))
    with pytest.raises(CheckpointError, match=r"other settings or data \(lr: 0.01, now 0.1\)"):
        train(config(checkpoints, photo_folder, tmp_path / "run", lr=0.1), resume=True)
    file = photo_folder / "03.png"
    original = file.read_bytes()
    for other in range(100, 200):  # of the same number of bytes: hub data sets and clouds keep no more than that
        picture(other, (64, 64)).save(file)
        if len(file.read_bytes()) <= len(original):
            break
    file.write_bytes(file.read_bytes().ljust(len(original), b"\0"))
    with pytest.raises(CheckpointError, match=r"\(pictures: '\w{8}', now '\w{8}'\).*--allow-change pictures"):
        train(config(checkpoints, photo_folder, tmp_path / "run"), resume=True)
    file.write_bytes(original)
    (photo_folder / "03.txt").write_text("Something else.")
    with pytest.raises(CheckpointError, match=r"\(data: '\w{8}', now '\w{8}'\).*--allow-change data"):
        train(config(checkpoints, photo_folder, tmp_path / "run"), resume=True)


def test_a_run_is_not_overwritten(checkpoints, photo_folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds a run already"):
        train(config(checkpoints, photo_folder, tmp_path / "run"))


def test_bad_rows_stop_the_run_or_are_quarantined(checkpoints, photo_folder, tmp_path):
    (photo_folder / "05.png").write_bytes(b"not a picture")
    (photo_folder / "06.txt").write_text("  \n")
    with pytest.raises(DataError, match=r"06\.txt"):
        train(config(checkpoints, photo_folder, tmp_path / "stopped"))
    settings = config(checkpoints, photo_folder, tmp_path / "run", on_bad_row="quarantine", max_steps=1)
    result = train(settings)
    rows = [json.loads(line) for line in (tmp_path / "run/quarantined.jsonl").read_text().splitlines()]
    assert len(rows) == len(result.bad) == 2
    assert len(result.train_examples) + len(result.held_out) + len(rows) == 12
    assert any("05.png" in row["reason"] for row in rows)


def test_the_check_that_a_stopped_run_names_finds_what_stopped_it(checkpoints, photo_folder, tmp_path, capsys):
    """With the run's own columns and held-out data: without these it would find other rows, or none."""
    val = tmp_path / "val: 1"
    val.mkdir()
    (val / "same.png").write_bytes((photo_folder / "03.png").read_bytes())
    (val / "rows.csv").write_text("bild,text\nsame.png,x\n")
    (photo_folder / "rows.csv").write_text("bild,text\n03.png,x\n04.png,y\n")
    settings = {"val": str(val), "columns": "image=bild,caption=text", "format": "csv", "max_tokens": 100}
    with pytest.raises(DataError, match="1 rows cannot be used") as told:
        train(config(checkpoints, photo_folder, tmp_path / "run", **settings))
    command = re.search(r"\((vlm-lora check .*) lists all\)", str(told.value)).group(1)
    assert main([*shlex.split(command)[1:], "--json"]) == 1
    (bad,) = json.loads(capsys.readouterr().out)["bad"]
    assert (bad["source"], bad["line"]) == ("rows.csv", 2)


def test_an_answer_that_is_too_long_is_reported_before_the_tower_runs(checkpoints, photo_folder, tmp_path, monkeypatch):
    (photo_folder / "02.txt").write_text("word " * 200)
    monkeypatch.setattr(FeatureCache, "prepare", lambda self, image: pytest.fail("the tower runs"))
    with pytest.raises(DataError, match=r"needs \d+ tokens.*--max-tokens is 120.*\(vlm-lora check .* lists all\)"):
        train(config(checkpoints, photo_folder, tmp_path / "run", max_tokens=120))


def test_micro_batches_change_nothing(checkpoints, photo_folder, tmp_path):
    whole = adapter_of(train(config(checkpoints, photo_folder, tmp_path / "whole", dropout=0.0)).folder)
    single = adapter_of(
        train(config(checkpoints, photo_folder, tmp_path / "single", dropout=0.0, micro_batch_tokens=1)).folder
    )
    for name in whole:
        torch.testing.assert_close(single[name], whole[name], rtol=2e-3, atol=2e-5)


def test_epochs_of_no_answer_are_one_line(checkpoints, photo_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"--epochs 0.001 of 10 answers is none; expected enough for one answer"):
        train(config(checkpoints, photo_folder, tmp_path / "run", epochs=0.001))
