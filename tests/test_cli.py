"""The command line as a user meets it: what goes to stdout, what to stderr, the exit code."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from huggingface_hub import ModelCard

from tests.conftest import picture
from vlm_lora.cli import main


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, checkpoints):
    """A run on twelve pictures with sidecar captions."""
    base = tmp_path_factory.mktemp("cli")
    photos = base / "photos"
    photos.mkdir()
    for i in range(12):
        picture(i, (64 + 16 * (i % 3), 64)).save(photos / f"{i:02}.png")
        (photos / f"{i:02}.txt").write_text(f"Picture number {i}.\n")
    command = ["train", str(photos), "--model", str(checkpoints["qwen2_vl"]), "--output", str(base / "run")]
    command += ["--epochs", "2", "--batch-size", "4", "--lr", "1e-2", "--val-split", "0.2", "--rank", "4"]
    done = subprocess.run([sys.executable, "-m", "vlm_lora", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (base / "stdout").write_text(done.stdout)
    (base / "stderr").write_text(done.stderr)
    return base


def test_train_tells_what_trains_what_was_gained_and_what_to_do_next(run_folder):
    stdout, stderr = (run_folder / "stdout").read_text(), (run_folder / "stderr").read_text()
    assert "Base against tuned, held out: 2 images, 2 captions" in stdout
    assert "95 % interval" in stdout
    assert "Data: sidecar. 10 images with 10 answers to learn; 2 held out." in stderr
    assert "vision tower" in stderr
    assert "vlm-lora caption PATH... --adapter" in stderr
    assert "Traceback" not in stderr
    for name in ("adapter", "config.yaml", "metrics.jsonl", "report.html", "checkpoints", "scores.json"):
        assert (run_folder / "run" / name).exists(), name
    assert "data:image/" in (run_folder / "run/report.html").read_text(encoding="utf-8")
    card = ModelCard.load(run_folder / "run/adapter/README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "image-text-to-text")
    assert {r.metric_type for r in card.data.eval_results} >= {"cider_d", "rouge_l"}
    assert "10 images learnt with 10 answers, 2 held out, 0 rows left out" in card.text


def test_one_image_gives_its_caption_alone(run_folder, capsys):
    picture(77).save(run_folder / "one.png")
    assert main(["caption", str(run_folder / "one.png"), "--adapter", str(run_folder / "run")]) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert "one.png" not in out
    assert err == ""


def test_a_folder_as_jsonl_with_a_bad_image_is_done_in_part(run_folder, tmp_path, capsys):
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"nothing")
    code = main(["caption", str(tmp_path), "--adapter", str(run_folder / "run/adapter"), "--format", "jsonl"])
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 3
    assert [sorted(row) for row in rows] == [["caption", "image"], ["error", "image"], ["caption", "image"]]
    assert "1 of 3 images could not be captioned" in err


def test_sidecars_are_written_once(run_folder, tmp_path, capsys):
    for i in range(2):
        picture(i).save(tmp_path / f"{i}.png")
    (tmp_path / "0.txt").write_text("mine")
    command = ["caption", str(tmp_path), "--adapter", str(run_folder / "run"), "--format", "sidecar"]
    assert main(command) == 0
    assert (tmp_path / "0.txt").read_text() == "mine"
    assert (tmp_path / "1.txt").read_text().strip()
    assert main([*command, "--overwrite"]) == 0
    assert (tmp_path / "0.txt").read_text() != "mine"
    picture(3).save(tmp_path / "1.jpg")
    assert main(command) == 2
    assert "would share one caption file" in capsys.readouterr().err


def test_eval_as_json(run_folder, capsys):
    command = ["eval", str(run_folder / "photos"), "--adapter", str(run_folder / "run"), "--json"]
    assert main([*command, "--max-new-tokens", "8", "--output", str(run_folder / "eval")]) == 0
    out, _ = capsys.readouterr()
    scores = json.loads(out)
    assert (scores["examples"], scores["answers"]) == (12, 12)
    card = (run_folder / "run/adapter/README.md").read_text(encoding="utf-8")
    assert card.count("## On photos, held out\n") == card.count("## On photos\n") == 1
    for who in ("base", "tuned"):
        assert {"exact_match", "vqa_accuracy", "cider_d", "bleu_4", "rouge_l", "anls"} <= scores[who].keys()
    assert (run_folder / "eval/report.html").exists()
    assert len((run_folder / "eval/predictions.jsonl").read_text().splitlines()) == 12


def test_eval_goes_on_without_a_broken_image_and_tells_what_was_forgotten(run_folder, tmp_path, capsys):
    shutil.copytree(run_folder / "photos", tmp_path / "photos")
    whole = (tmp_path / "photos/03.png").read_bytes()
    (tmp_path / "photos/03.png").write_bytes(whole[: len(whole) // 2])
    command = ["eval", str(tmp_path / "photos"), "--adapter", str(run_folder / "run"), "--max-new-tokens", "4"]
    assert main([*command, "--also", str(run_folder / "photos"), "--json"]) == 3
    out, err = capsys.readouterr()
    scores = json.loads(out)
    assert (scores["examples"], scores["also"]["examples"]) == (11, 12)
    assert [row["source"] for row in scores["failed"]] == ["03.png:1"]
    assert "Left out: 03.png:1: '03.png' is damaged or cut off" in err
    assert "1 rows were left out of this." in err


def test_check_names_every_bad_row(run_folder, tmp_path, capsys):
    assert main(["check", str(run_folder / "photos"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["format"], told["examples"], told["images"], told["answers"]) == ("sidecar", 12, 12, 12)
    assert told["bad"] == []
    picture(1).save(tmp_path / "a.png")
    picture(2).save(tmp_path / "b.png")
    (tmp_path / "rows.jsonl").write_text(
        '{"image": "a.png", "caption": "good"}\n{"image": "gone.png", "caption": "x"}\n{"image": "b.png", "capt\n'
    )
    assert main(["check", str(tmp_path / "rows.jsonl"), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [row["line"] for row in told["bad"]] == [2, 3]
    assert told["answers"] == 1


def test_cache_shows_and_clears(run_folder, checkpoints, capsys):
    command = ["train", str(run_folder / "photos"), "--model", str(checkpoints["qwen2_vl"]), "--no-eval"]
    assert main([*command, "--max-steps", "1", "--output", str(run_folder / "run2")]) == 0
    capsys.readouterr()
    assert main(["cache"]) == 0
    assert ": 12 images, " in capsys.readouterr().out
    assert main(["cache", "--clear"]) == 0
    capsys.readouterr()
    assert main(["cache"]) == 0
    assert ": 0 images, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["train"], 2, "no data given"),
        (["train", "nowhere"], 1, "nowhere"),
        (["train", "x", "--lr", "-1"], 2, "--lr is -1.0; expected a finite number above 0"),
        (["train", "x", "--min-pixels", "9", "--max-pixels", "3"], 2, "--min-pixels 9 is above"),
        (["train", "--config", "gone.yaml"], 2, "gone.yaml"),
        (["caption", "gone.png"], 2, "no such file"),
        (["caption", ".", "--adapter", "gone"], 2, "No image in"),
        (["eval", "x", "--adapter", "gone", "--model", "tiny"], 1, "--adapter gone: there is no such folder"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(command, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vlm-lora: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: x\nlr_rate: 1\n", "unknown setting 'lr_rate'"),
        ("data: x\nrankk: 4\n", "Did you mean 'rank'"),
        ("data: x\nrank: four\n", "rank is 'four'; expected int"),
        ("data: x\nrank: true\n", "rank is True; expected int"),
        ("- a\n", "expected 'name: value' lines"),
        ("a: [\n", "is not YAML"),
        ("rank: 4\n", "no data given"),
    ],
)
def test_a_run_file_is_checked(text, message, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 2
    assert message in capsys.readouterr().err


def test_flags_go_before_the_run_file(tmp_path):
    from vlm_lora.config import config_from, read_yaml

    (tmp_path / "run.yaml").write_text("data: x\nlr: 2e-4\nrank: 8\nalpha: null\n")
    config = config_from(read_yaml(tmp_path / "run.yaml") | {"rank": 4}, "test")
    assert (config.lr, config.rank, config.lora_alpha) == (2e-4, 4, 8)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_says_so(run_folder, checkpoints, tmp_path, number, code):
    """And going on gives, to the bit, the adapter of the run that was never stopped."""
    command = ["train", str(run_folder / "photos"), "--model", str(checkpoints["qwen2_vl"]), "--no-eval", "--rank", "4"]
    command += ["--epochs", "30", "--batch-size", "4", "--lr", "1e-2", "--dropout", "0.1", "--val-split", "0.2"]
    if not (run_folder / "straight").exists():
        assert main([*command, "--output", str(run_folder / "straight")]) == 0
    stopped = [*command, "--output", str(tmp_path / "run")]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # equal bits want an equal number
    line = [sys.executable, "-m", "vlm_lora", *stopped]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=os.environ | threads)
    log = tmp_path / "run/metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 5):
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == code, stderr
    (saved,) = (tmp_path / "run/checkpoints").iterdir()
    assert f"stopped after step {int(saved.name.removeprefix('step-'))} and saved; resume it with --resume" in stderr
    assert "Traceback" not in stderr
    assert main([*stopped, "--resume"]) == 0
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (run_folder / "straight" / name).read_bytes()
