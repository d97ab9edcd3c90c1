"""The bench of real sizes, at a size for any machine: every way to compute a step gives the same step."""

import json

import pytest

from bench import gpu


def test_every_variant_has_the_same_loss_and_gradients(capsys, monkeypatch):
    flags = "--size small --base float32 --images 3 --captions 3 --side 112 --rounds 1 --new-tokens 4"
    monkeypatch.setattr("sys.argv", ["bench.gpu", *flags.split()])
    gpu.main()
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    result = record["results"]["float32"]
    rows = result["training"]
    assert set(rows) == set(gpu.VARIANTS)
    for row in rows.values():
        assert row["loss"] == pytest.approx(rows["all"]["loss"], rel=1e-5)
        assert row["gradient_difference"] < 1e-4
        assert row["answers_per_second"] > 0
    assert result["captioning"]["images_per_second"] > 0
    work = {name: row["utilisation"] / row["answers_per_second"] for name, row in rows.items()}  # operations an answer
    assert work["plain"] > work["own prefix"] > work["all"]
    assert work["live tower"] > work["all"]
    assert work["full logits"] > work["all"]
