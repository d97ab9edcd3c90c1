"""What the speed bench compares is the same work, and what it leaves out is really left out."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import distributed, engines, methods, quality, speed
from bench.plain_counts import PlainLoop
from bench.quality import reached
from bench.speed import COLD, EPOCHS, OURS
from bench.speed_report import plots, summary, table
from vlm_lora import cli
from vlm_lora.config import TrainConfig
from vlm_lora.model.backbone import Backbone
from vlm_lora.training.trace import MicroShape, Traced, TracedModel


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    """Twice five captions of 16-token pictures, two epochs of one step."""
    work = tmp_path_factory.mktemp("work")
    return speed.prepare(work, "smoke", "float32", "5 captions", 16, 10, epochs=2)


def train_as(techniques: str, common: dict, folder: Path, monkeypatch) -> tuple[dict, dict]:
    """The result of vlm-lora with these techniques, and how much it computed in its steps."""
    done = {"rows": 0, "logits": 0, "towers": 0}
    forward, logits, tower = Backbone.forward, Backbone.logits, Backbone.tower

    def count(name, call, size):
        def counted(self, *args, **kwargs):
            if self.device.type != "meta":  # there a run's cost is traced, and nothing is computed
                done[name] += size(*args)
            return call(self, *args, **kwargs)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(Backbone, "forward", count("rows", forward, lambda ids, *_: len(ids)))
        patch.setattr(Backbone, "logits", count("logits", logits, lambda hidden: hidden[..., 0].numel()))
        patch.setattr(Backbone, "tower", count("towers", tower, lambda *_: 1))
        patch.setattr(sys, "path", [str(speed.PEERS), *sys.path])
        patch.setenv("VLM_LORA_CACHE", str(folder / "cache"))
        job = {"output": str(folder / "run"), "result": str(folder / "result.json"), "spawned": time.time()}
        speed.train_here(common | job | {"techniques": techniques})
    return json.loads((folder / "result.json").read_text()), done


def test_every_tool_and_technique_has_the_same_losses(common, tmp_path, monkeypatch):
    runs, counts = {}, {}
    for techniques in speed.TECHNIQUES.values():
        folder = tmp_path / f"with {techniques}"
        folder.mkdir()
        runs[techniques], counts[techniques] = train_as(techniques, common, folder, monkeypatch)
    assert speed.parity(runs, 1e-5) <= 1e-5

    everything, nothing = counts["labels cache share"], counts[""]
    assert everything["rows"] == counts["share"]["rows"] == 2 * 2  # images
    assert nothing["rows"] == counts["labels"]["rows"] == counts["cache"]["rows"] == 2 * 10  # answers
    assert everything["towers"] == counts["cache"]["towers"] == 2
    assert counts["share"]["towers"] >= 2 * 2
    assert min(nothing["towers"], counts["labels"]["towers"]) >= 2 * 10
    assert everything["logits"] == counts["labels"]["logits"] < counts["share"]["logits"] < nothing["logits"]

    # The plain loop imports nothing of ours.
    monkeypatch.syspath_prepend(str(speed.PEERS))
    import plain

    job = common | {"result": str(tmp_path / "plain.json"), "spawned": time.time()}
    (tmp_path / "job.json").write_text(json.dumps(job))
    monkeypatch.setattr(sys, "argv", ["plain.py", str(tmp_path / "job.json")])
    plain.main()
    runs["plain"] = json.loads((tmp_path / "plain.json").read_text())
    assert speed.parity(runs, 1e-5) <= 1e-5
    runs["plain"]["losses"][0] += 1e-3
    with pytest.raises(SystemExit, match="differ"):
        speed.parity(runs, 1e-5)


def test_the_cost_model_predicts_what_sharing_and_the_cache_save(common):
    ratios = speed.predicted(common)
    assert ratios["epoch"] > ratios["whole"] > 2  # five captions, 16 tokens of image
    assert speed.predicted(common | {"image_tokens": 64})["epoch"] > ratios["epoch"]


def test_the_methods_table_is_that_of_the_docs_and_of_one_budget(tmp_path, monkeypatch, capsys):
    rows = methods.read_record(methods.RECORD)["methods"]
    shown = (methods.ROOT / "docs/methods.md").read_text(encoding="utf-8").splitlines()
    for line in methods.table({name: rows[name] for name in methods.METHODS}).splitlines():
        assert line in shown, line
    with pytest.raises(AssertionError):
        methods.table(rows | {"lora": rows["lora"] | {"steps": 2}})
    monkeypatch.setattr(methods, "train_one", None)  # refused before anything is trained
    monkeypatch.setattr(sys, "argv", ["methods", "--methods", "lora", "--steps", "2"])
    with pytest.raises(SystemExit):
        methods.main()
    assert "holds full with 450 steps" in capsys.readouterr().err
    for name, (_, rates, steps) in methods.METHODS.items():
        searched = methods.read_record(methods.RECORD)["search"][name]
        assert (searched["steps"], [float(lr) for lr in searched["held_out_loss"]]) == (steps, list(rates)), name


def run_of(method: str, steps: float, prepare: float, peak: int, **more) -> dict:
    return {
        "suite": "main", "workload": "5 captions, 256 tokens", "answers": 20, "method": method, "startup": 9.0,
        "steps": [steps / 2, steps], "prepare": prepare, "cpu": steps, "process_cpu": 20.0, "losses": [8.0, 7.0],
        "base_bytes": 1000, "peak_bytes": 1000 + peak, "process_peak_bytes": 5000,
    } | more  # fmt: skip


def test_ratios_are_of_medians_to_the_best_of_the_others(tmp_path):
    runs = [run_of("plain", steps, 0.0, 100) for steps in (40.0, 90.0, 38.0)]
    runs += [run_of("trl", 50.0, 0.0, 80), run_of(OURS, 4.0, 0.0, 20), run_of(COLD, EPOCHS * 5.0, 1.0, 30)]
    promised = {"5 captions, 256 tokens, 20 answers": {"epoch": 8.0, "whole": 7.5}}
    record = {"machine": "a core", "settings": {"dtype": "float32"}, "predicted": promised, "runs": runs}
    (row,) = summary(record).values()
    assert (row["epoch"], row["whole"], row["memory"]) == (10.0, 7.5, 0.375)
    assert row["met"] == {"epoch": True, "whole": True, "memory": True}
    assert row["of_model"] == {"epoch": 1.25, "whole": 1.0}
    runs[-1]["steps"][-1] = 20.0
    (row,) = summary(record).values()
    assert row["met"] == {"epoch": True, "whole": False, "memory": True}
    assert "5.71x (at least 7x: **not met**)" in table(record)
    (path,) = plots(record, tmp_path)
    assert path.read_text().count("<polyline") == 2  # the epochs' panel; one workload gives no other line


def test_quality_is_reached_where_it_stays():
    curve = [{"step": step, "accuracy": accuracy} for step, accuracy in enumerate((0.5, 0.96, 0.94, 0.95, 0.97))]
    assert reached(curve, 0.95)["step"] == 3
    assert reached(curve, 0.98) is None


def test_the_plain_loop_learns_what_the_shuffled_order_does(tmp_path, monkeypatch):
    def here(method, job, _):
        """`speed.run_once` without a process of its own."""
        import plain

        assert method == "plain"
        result = tmp_path / "result.json"
        (tmp_path / "job.json").write_text(json.dumps(job | {"result": str(result), "spawned": time.time()}))
        monkeypatch.setattr(sys, "argv", ["plain.py", str(tmp_path / "job.json")])
        plain.main()
        return json.loads(result.read_text()) | {"steps": [3.0, 6.0], "cpu": 4.0}

    monkeypatch.syspath_prepend(str(speed.PEERS))
    monkeypatch.setenv("VLM_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(quality, "run_once", here)
    monkeypatch.setattr(quality, "HELD_OUT", 2)
    monkeypatch.setattr(quality, "SETTINGS", quality.SETTINGS | {"batch_size": 6})
    shuffled = quality.one("shuffled", 0, 3, 2, tmp_path / "run")
    plain = quality.plain(shuffled, 3, 2, tmp_path / "plain")

    assert [point["step"] for point in plain["curve"]] == [2, 3]
    assert [point["seconds"] for point in plain["curve"]] == [6.0, 9.0]
    assert [point["cpu"] for point in plain["curve"]] == [4.0, 6.0]
    assert [p["accuracy"] for p in plain["curve"]] == [p["accuracy"] for p in shuffled["curve"]]
    record = {"settings": {"goal": 0.0}, "runs": [plain], "reached": {"plain, seed 0": plain["curve"][0]}}
    assert "| plain, seed 0 (steps x the mean of 2) | 2 | 6 | 4 |" in quality.table(record)

    rows = [json.loads(line)["image"] for line in (tmp_path / "plain/rows.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 6
    assert len(set(rows[:6])) > 2  # side by side, six answers would be of two images at most

    apart = [shuffled["losses"][0], shuffled["losses"][1] + 1e-3]
    with pytest.raises(SystemExit, match="differ"):
        quality.plain(shuffled | {"losses": apart}, 3, 2, tmp_path / "plain")


def test_the_bench_of_two_processes_reads_its_runs(photo_folder, tmp_path, monkeypatch):
    """In this process; that the launcher's line runs is tests/training/test_processes.py's."""

    def here(command, **_):
        assert command[1:3] == ["-m", "torch.distributed.run"]
        assert cli.main(command[command.index("vlm_lora") + 1 :]) == 0

    monkeypatch.setattr(distributed.subprocess, "run", here)
    monkeypatch.setattr(distributed, "DATA", photo_folder)
    steps = distributed.WARM_UP + 3
    result = distributed.one(1, steps, tmp_path)
    assert result["step_seconds"] > 0
    assert result["answers_per_second"] == pytest.approx(64 / result["step_seconds"])
    assert result["imbalance"] == 1
    (run,) = tmp_path.glob("1-*")
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-2]
    assert (last["step"], last["loss"]) == (steps, result["loss"])


def test_the_engines_table_in_the_docs_is_that_of_the_record():
    record = json.loads(engines.RECORD.read_text())
    text = (engines.ROOT / "docs/serving.md").read_text()
    assert f"<!-- engines -->\n{engines.table(record)}\n<!-- end of engines -->" in text
    assert all(fault["seen"] for fault in record["faults"])
    failed = [cell for cell in record["cells"] if cell["other"] and cell["format"] in record["margin"]]
    told = text.partition("<!-- end of engines -->")[2]
    assert all(cell["family"] in told for cell in failed), "a cell that fails is told of below the table"


def test_the_plain_loop_that_is_counted_computes_what_this_does(checkpoints):
    """The same products, to the operation; and beside them the conversions that are PEFT's."""
    model, shape = str(checkpoints["qwen2_vl"]), MicroShape(3, 40, 30, 3, 12, (64,) * 3)
    ours = TracedModel(TrainConfig(data="x", model=model, rank=4), torch.bfloat16, "cuda")
    loop = PlainLoop(model, ours.num_layers, 4)

    def products(traced: Traced) -> int:
        return sum(n * kernel.operations for kernel, n in traced.kernels.items() if kernel.name in ("mm", "addmm"))

    def conversions(traced: Traced) -> int:
        return sum(n for kernel, n in traced.kernels.items() if kernel.name == "_to_copy")

    here, theirs = ours.step(shape), loop.step(shape)
    assert products(theirs) == products(here)
    linears = 7 * ours.num_layers + 2  # of each: the input there and back, both tensors, and all four gradients
    assert conversions(theirs) == 8 * linears + 1  # rotary angles
    assert conversions(here) < conversions(theirs) / 2
