"""The bench of real sizes, at a size for any machine: every way to compute a step gives the same step."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers.models.qwen2_vl import modeling_qwen2_vl as modelling

from bench import gpu, users_loop
from vlm_lora.config import TrainConfig
from vlm_lora.model.adapters.methods import attach_adapter
from vlm_lora.model.backbone import load_backbone

FLAGS = "--images 3 --captions 3 --answers 1 3 --side 112 --rounds 1 --new-tokens 4"
TIMED = ["answers an image: 1", "answers an image: 3"]


def measured(capsys, monkeypatch, flags: str, code: int = 0) -> list[dict]:
    """The record of each size."""
    monkeypatch.setattr("sys.argv", ["bench.gpu", *flags.split(), *FLAGS.split()])
    assert gpu.main() == code
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def written(monkeypatch) -> list[tuple[str, str, str]]:
    """(size, base, part) of what each state of the records ends with, as they are written."""
    states = []

    def write(record: gpu.Record) -> None:
        found = record.facts["results"]
        base = next(reversed(found), "")
        states.append((record.facts["size"], base, next(reversed(found.get(base, {})), "")))

    monkeypatch.setattr(gpu.Record, "write", write)
    return states


def test_the_parts_in_their_order_each_written_as_it_ends(capsys, monkeypatch):
    monkeypatch.setitem(gpu.SIZES, "2b", gpu.SIZES["small"])
    states = written(monkeypatch)
    small, _ = measured(capsys, monkeypatch, "--size small 2b --base float32")
    assert states == [
        ("small", "", ""),
        *[("small", "float32", part) for part in ["equality", "trace", *TIMED]],
        *[("2b", "float32", part) for part in ["equality", *TIMED]],
        ("small", "float32", "captioning"),
        ("2b", "float32", "captioning"),
    ]
    assert small["faults"] == []
    assert small["matrix_product_per_second"]["float32"] > 0
    parts = small["results"]["float32"]

    rows = parts["equality"]["ways"]
    assert list(rows) == ["plain", gpu.LOOP, *(name for name in gpu.VARIANTS if name != "plain")]
    assert parts["equality"]["compared_with"] == "plain"
    for row in rows.values():
        assert row["loss"] == pytest.approx(rows["plain"]["loss"], rel=1e-5)
        assert row["gradient_difference"] < 1e-5
    again = parts["equality"]["the_same_step_again"]
    assert again["gradients_equal"] == (again["difference"] == 0)

    trace = parts["trace"]
    assert trace["traced_over_profiled"] == pytest.approx(trace["ms_traced"] / trace["ms_profiled"])
    products = trace["kinds"]["float32 products"]["traced"]
    assert products["count"] > 2 * 2 * 7  # forward and backward of two layers' linears
    assert trace["kinds"]["attention"]["profiled"]["ms"] > 0

    once, three = (parts[name]["ways"] for name in TIMED)
    assert list(once) == [gpu.LOOP, "all", gpu.ONCE]
    assert list(three) == [gpu.LOOP, "all"]
    for row in (*once.values(), *three.values()):
        assert row["answers_per_second"] == pytest.approx(row["answers"] / row["seconds"][0])
    assert once["all"]["answers"] == 3
    assert three["all"]["answers"] == 9
    (theirs,), (ours,) = three[gpu.LOOP]["seconds"], three["all"]["seconds"]
    assert three["all"]["users_loop_takes_times"] == pytest.approx(theirs * 9 / three[gpu.LOOP]["answers"] / ours)
    assert three[gpu.LOOP]["users_loop_takes_times"] == 1
    assert parts["captioning"]["images_per_second"] > 0


@pytest.mark.long
def test_every_variant_has_the_same_loss_and_gradients(capsys, monkeypatch):
    """bfloat16 and NF4, whose rounding is 2^16 times that of float32, within what is stated."""
    (record,) = measured(capsys, monkeypatch, "--size small --base nf4 bfloat16")
    assert record["faults"] == []
    assert list(record["results"]) == ["bfloat16", "nf4"]
    for base, parts in record["results"].items():
        assert (gpu.LOOP in parts["equality"]["ways"]) == (base == "bfloat16")
        assert all(row["gradient_difference"] < 1e-2 for row in parts["equality"]["ways"].values())
        once = parts[TIMED[0]]["ways"]
        work = {name: row["share_of_matrix_product"] / row["answers_per_second"] for name, row in once.items()
                if name != gpu.LOOP}  # fmt: skip
        assert work[gpu.ONCE] > work["all"]  # operations an answer
    nf4, bfloat16 = (record["results"][base][TIMED[1]]["predicted_bytes"] for base in ("nf4", "bfloat16"))
    assert nf4 < bfloat16


def test_linear_attention_is_measured_too(capsys, monkeypatch):
    (record,) = measured(capsys, monkeypatch, "--size qwen3.5-small --base float32")
    assert record["faults"] == []
    rows = record["results"]["float32"]["equality"]["ways"]
    assert list(rows) == list(gpu.VARIANTS)
    assert max(row["gradient_difference"] for row in rows.values()) < 1e-4


def test_another_loss_a_wrong_prediction_and_a_failure_are_faults():
    row = {"loss_difference": 0.0, "gradient_difference": 0.0}
    for name, value, number in (("loss_difference", 2e-3, 1), ("gradient_difference", 0.06, 1),
                                ("gradient_difference", float("nan"), 1), ("loss_difference", 5e-4, 0)):  # fmt: skip
        results = {"bfloat16": {"equality": {"ways": {"all": row | {name: value}, "plain": row}}}}
        assert len(list(gpu.faults(results))) == number
    for ratio, number in ((0.86, 0), (1.14, 0), (0.84, 1), (1.16, 1)):
        results = {"bfloat16": {"answers": {"ways": {"all": {"predicted_over_measured": ratio}}}}}
        assert len(list(gpu.faults(results))) == number
    for failed, number in ((gpu.OUT_OF_MEMORY, 0), ("KeyError: 'x'", 1)):
        assert len(list(gpu.faults({"nf4": {"captioning": {"failed": failed}}}))) == number


def test_what_fails_or_runs_out_of_memory_loses_nothing_else(capsys, monkeypatch, tmp_path):
    def failing(real, when, error=torch.OutOfMemoryError("CUDA out of memory")):  # noqa: B008
        def called(*given, **options):
            if when(*given, **options):
                raise error
            return real(*given, **options)

        return called

    monkeypatch.setattr(gpu, "loss_sum", failing(gpu.loss_sum, lambda *_, label_logits: not label_logits))
    monkeypatch.setattr(gpu.Captioner, "caption", failing(None, lambda *_, **__: True, KeyError("x")))
    monkeypatch.setitem(gpu.SIZES, "2b", gpu.SIZES["small"])
    monkeypatch.setattr(gpu, "write_model", failing(gpu.write_model, lambda size, *_: size == "2b"))
    flags = f"--size 2b small --base float32 --output {tmp_path}"
    large, small = measured(capsys, monkeypatch, flags, code=1)
    failed = {"failed": gpu.OUT_OF_MEMORY, "took_seconds": 0.0}
    assert large["results"] == {"float32": {"training": failed, "captioning": failed}}
    assert large["faults"] == []
    parts = small["results"]["float32"]
    ways = parts["equality"]["ways"]
    assert {name for name, row in ways.items() if "failed" in row} == {"plain", "full logits"}
    assert parts["equality"]["compared_with"] == gpu.LOOP
    assert parts[TIMED[1]]["ways"]["all"]["answers_per_second"] > 0
    assert small["faults"] == ["float32, captioning: KeyError: 'x'"]
    for record in (large, small):
        assert json.loads((tmp_path / f"gpu-{record['size']}.json").read_text(encoding="utf-8")) == record


def test_liger_patches_the_users_loop_alone(monkeypatch, checkpoints):
    """With a stand-in of its interface: it needs a GPU. The weights are there once."""
    backbone = load_backbone(str(checkpoints["qwen2_vl"]), dtype="float32", device=torch.device("cpu"))
    plain, calls = modelling.apply_rotary_pos_emb, []

    def patch(model) -> None:
        assert model is not backbone.model
        monkeypatch.setattr(modelling, "apply_rotary_pos_emb", lambda *given: calls.append(1) or plain(*given))

    name = "liger_kernel.transformers.monkey_patch"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(apply_liger_kernel_to_qwen2_vl=patch))
    monkeypatch.setattr(users_loop, "version", lambda package: package + " 1")
    config = TrainConfig(data="none")
    loop = users_loop.UsersLoop(backbone, config)
    assert loop.liger == "liger-kernel 1"
    shared = {id(p) for p in loop.model.parameters()}
    assert all(id(p) in shared for p in backbone.model.parameters())
    attach_adapter(backbone, config)
    work = gpu.Work(backbone, 2, 2, 56, 3, 512)
    expected = work.loss(*gpu.VARIANTS["plain"])
    assert calls == []
    assert loop.loss(work) == pytest.approx(expected, rel=1e-5)
    assert len(calls) == len(backbone.language_model.layers)
    assert modelling.apply_rotary_pos_emb is plain


def test_the_users_loop_without_what_it_needs(capsys, monkeypatch):
    """It is recorded as failed, and a fault; what it is compared with is measured all the same."""

    def refuse(*_, **__):
        raise RuntimeError("other versions")

    monkeypatch.setattr(users_loop, "get_peft_model", refuse)
    (record,) = measured(capsys, monkeypatch, "--size small --base float32", code=1)
    parts = record["results"]["float32"]
    assert parts["equality"]["ways"][gpu.LOOP] == {"failed": "RuntimeError: other versions"}
    assert parts["equality"]["compared_with"] == "plain"
    assert "users_loop_takes_times" not in parts[TIMED[0]]["ways"]["all"]
    assert len(record["faults"]) == 3  # where it is compared, and where it is timed


def test_compiled_layers_are_used_where_they_are_asked_for_and_nowhere_else(capsys, monkeypatch):
    """With a compiler that only counts: the real one takes minutes, and not every machine has one."""
    ran = []

    def count(forward, **_):
        return lambda *args, **more: ran.append(1) or forward(*args, **more)

    monkeypatch.setattr(torch, "compile", count)
    (record,) = measured(capsys, monkeypatch, "--size small --base float32 --compiled")
    assert record["faults"] == []
    parts = record["results"]["float32"]
    compiled = [name.replace(":", ", compiled layers:") for name in TIMED]
    assert list(parts) == ["equality", "trace", *TIMED, "equality of compiled layers", *compiled, "captioning"]
    assert list(parts[compiled[1]]["ways"]) == [gpu.LOOP, "all", gpu.COMPILED]
    assert parts[compiled[1]]["ways"][gpu.COMPILED]["users_loop_takes_times"] > 0
    assert parts["equality of compiled layers"]["ways"][gpu.COMPILED]["gradient_difference"] < 1e-5
    layers, steps = gpu.SIZES["small"]["text"]["num_hidden_layers"], 1 + 2 * len(TIMED)  # a warm-up and a round each
    assert len(ran) == layers * steps
