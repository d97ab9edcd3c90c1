"""The bench of real sizes, at a size for any machine: every way to compute a step gives the same step."""

import json

import pytest
import torch

from bench import gpu

FLAGS = "--images 3 --captions 3 --side 112 --rounds 1 --new-tokens 4"


def measured(capsys, monkeypatch, flags: str, code: int = 0) -> list[dict]:
    """The record of each size."""
    monkeypatch.setattr("sys.argv", ["bench.gpu", *flags.split(), *FLAGS.split()])
    assert gpu.main() == code
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


@pytest.mark.long
def test_every_variant_has_the_same_loss_and_gradients(capsys, monkeypatch):
    """float32 as close as its rounding; bfloat16 and NF4, whose rounding is 2^16 times that, within what is stated."""
    (record,) = measured(capsys, monkeypatch, "--size small --base float32 bfloat16 nf4")
    assert record["faults"] == []
    assert set(record["results"]) == {"float32", "bfloat16", "nf4"}
    for base, result in record["results"].items():
        rows = result["training"]
        assert list(rows) == list(gpu.VARIANTS)
        assert result["compared_with"] == "plain"
        for row in rows.values():
            assert row["loss"] == pytest.approx(rows["plain"]["loss"], rel=1e-5)
            assert row["gradient_difference"] < (1e-5 if base == "float32" else 1e-2)
            assert row["answers_per_second"] > 0
            if not torch.cuda.is_available():
                assert "peak_bytes" not in row
        assert result["captioning"]["images_per_second"] > 0
        assert result["predicted_bytes"] > 0
        work = {name: row["share_of_matrix_product"] / row["answers_per_second"] for name, row in rows.items()}
        assert work["plain"] > work["own prefix"] > work["all"]  # operations an answer
        assert work["live tower"] > work["all"]
        assert work["full logits"] > work["all"]
    assert record["results"]["nf4"]["predicted_bytes"] < record["results"]["bfloat16"]["predicted_bytes"]


def test_linear_attention_is_measured_too(capsys, monkeypatch):
    (record,) = measured(capsys, monkeypatch, "--size qwen3.5-small --base float32")
    assert record["faults"] == []
    rows = record["results"]["float32"]["training"]
    assert all(row["loss"] == pytest.approx(rows["plain"]["loss"], rel=1e-5) for row in rows.values())
    assert max(row["gradient_difference"] for row in rows.values()) < 1e-4


@pytest.mark.long
def test_a_wrong_technique_and_a_wrong_prediction_are_faults(capsys, monkeypatch):
    """Negative control."""
    right = gpu.loss_sum
    monkeypatch.setattr(
        gpu,
        "loss_sum",
        lambda *given, label_logits: (1.2 if label_logits else 1.0) * right(*given, label_logits=label_logits),
    )
    (record,) = measured(capsys, monkeypatch, "--size small --base bfloat16", code=1)
    assert len(record["faults"]) == 2 * 3  # loss and gradients of all but the two that compute every logit
    result = record["results"]["bfloat16"]
    for row in result["training"].values():
        row |= {"loss": 1.0, "gradient_difference": 0.0}
    assert gpu.faults(record["results"]) == []
    for ratio, number in ((0.86, 0), (1.14, 0), (0.84, 1), (1.16, 1)):
        assert len(gpu.faults({"bfloat16": result | {"predicted_over_measured": ratio}})) == number


def test_what_runs_out_of_memory_loses_nothing_else(capsys, monkeypatch):
    def short(real, when):
        def called(*given, **options):
            if when(*given, **options):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(*given, **options)

        return called

    monkeypatch.setattr(gpu, "loss_sum", short(gpu.loss_sum, lambda *_, label_logits: not label_logits))
    monkeypatch.setattr(gpu, "load_backbone", short(gpu.load_backbone, lambda *_, dtype, **__: dtype == "bfloat16"))
    monkeypatch.setattr(gpu.Captioner, "caption", short(None, lambda *_, **__: True))
    monkeypatch.setitem(gpu.SIZES, "2b", gpu.SIZES["small"])
    monkeypatch.setattr(gpu, "write_model", short(gpu.write_model, lambda size, *_: size == "2b"))
    monkeypatch.setattr(gpu, "ROOT", gpu.Path("/nowhere"))
    monkeypatch.setattr(gpu.Path, "write_text", lambda *_, **__: 0)
    large, small = measured(capsys, monkeypatch, "--size 2b small --base bfloat16 float32")
    failed = {"failed": "out of memory"}
    assert large["results"] == {"bfloat16": failed, "float32": failed}
    assert small["results"]["bfloat16"] == failed
    result = small["results"]["float32"]
    assert result["compared_with"] == "own prefix"
    assert {name: row for name, row in result["training"].items() if "failed" in row} == {
        "plain": failed,
        "full logits": failed,
    }
    assert result["captioning"] == failed
    assert result["training"]["all"]["answers_per_second"] > 0
    assert small["faults"] == []


def test_peaks_are_of_devices_by_name():
    assert gpu.peak_rate("NVIDIA H100 80GB HBM3") == 989e12
    assert gpu.peak_rate("x86_64 CPU") is None


def test_compiled_layers_are_used_where_they_are_asked_for_and_nowhere_else(capsys, monkeypatch):
    """With a compiler that only counts: the real one takes minutes, and not every machine has one."""
    ran = []

    def count(forward, **_):
        return lambda *args, **more: ran.append(1) or forward(*args, **more)

    monkeypatch.setattr(torch, "compile", count)
    (record,) = measured(capsys, monkeypatch, "--size small --base float32 --compiled")
    assert record["faults"] == []
    rows = record["results"]["float32"]["training"]
    assert list(rows) == [*gpu.VARIANTS, gpu.AGAIN, gpu.COMPILED]
    layers, steps = gpu.SIZES["small"]["text"]["num_hidden_layers"], 2  # the warm-up and one round
    assert len(ran) == layers * steps
