"""What the command line says to a slip of the finger: the flag that was meant, the name that was meant; and its help.

Run: pytest tests/test_usage.py
"""

import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.hub_server import Hub, Repository
from vlm_lora.cli import VERBS, command_line, main
from vlm_lora.config import ELSEWHERE, EVERYDAY, KNOBS, TrainConfig
from vlm_lora.training.folder import newest_unfinished, run_stem


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train x --batchsize 3", "train: there is no flag --batchsize. Did you mean --batch-size? See vlm-lora train"),
        ("train x --learning-rate 3", "Did you mean --lr?"),
        ("train x --lora_r=3", "there is no flag --lora_r. Did you mean --rank?"),
        ("train --dataset x", "The data is given without a flag: vlm-lora train DATA."),
        ("check x --lr 3", "there is no flag --lr. It belongs to vlm-lora train."),
        ("caption x --adpter y", "caption: there is no flag --adpter. Did you mean --adapter?"),
        ("caption x --zzz", "there is no flag --zzz. See vlm-lora caption --help."),
        ("train x --rank", "argument --rank: expected one argument. See"),
        ("train x --on-bad-row skip", "(choose from 'stop', 'quarantine')"),
        ("cache now", "cache: 'now' is one too many."),
        ("trian x", "there is no command 'trian'. Did you mean train? See vlm-lora --help."),
        ("photos", "there is no command 'photos'. The commands are train, caption"),
        ("--zzz", "there is no flag --zzz."),
    ],
)
def test_a_slip_is_answered_by_what_was_meant(command, said, capsys):
    assert main(command.split()) == 2
    out, err = capsys.readouterr()
    usage, told = err.splitlines()
    assert out == ""
    assert said in told
    verb = command.split()[0] if command.split()[0] in ("train", "check", "caption", "cache") else "COMMAND"
    assert usage.startswith(f"usage: vlm-lora {verb} ")


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 2
    assert "vlm-lora train ./photos" in capsys.readouterr().err


def shown(command: str, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_shows_the_everyday_flags_and_help_all_the_rest(capsys):
    short, whole = shown("train --help", capsys), shown("train --help-all", capsys)
    rare = [knob.flag for knob in KNOBS.values() if knob.name not in EVERYDAY]
    assert all(knob.flag in short for knob in KNOBS.values() if knob.name in EVERYDAY and knob.name != "data")
    assert [flag for flag in rare if f"  {flag}" in short] == []
    assert all(f"  {flag}" in whole for flag in rare)
    assert "more flags: vlm-lora train --help-all" in short
    assert "more flags" not in whole
    assert len(short.splitlines()) < 80
    for verb in VERBS:
        parser = command_line().verbs[verb.__name__.rpartition(".")[2].replace("evaluate", "eval")]
        named = {action.dest for action in parser._actions}
        assert set(getattr(verb, "EVERYDAY", ())) <= named, f"{verb.__name__} has no such flag"


def test_the_words_of_other_tools_are_no_words_of_ours():
    assert not ELSEWHERE.keys() & KNOBS.keys()
    assert set(ELSEWHERE.values()) <= KNOBS.keys()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("learning_rate: 1", "unknown setting 'learning_rate'. Did you mean 'lr'?"),
        ("base_model: tiny", "Did you mean 'model'?"),
        ("adapter_name_or_path: x", "Did you mean 'from'?"),
        ("no_eval: true", "'no_eval' is a flag of the command, and no setting of a run file. Give it there: vlm-lora"),
    ],
)
def test_a_run_file_with_another_tools_word(line, said, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(f"data: x\n{line}\n")
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "stem"),
    [
        ("photos", "photos"), ("photos/train", "photos"), ("photos/train.jsonl", "photos"), ("photos/Train", "photos"),
        ("photos/data/train/metadata.jsonl", "photos"), ("my pets.v2", "my-pets"), ("/train", "train"),
        ("photos/training-set", "training-set"), ("hf:owner/foxes:train[:10]", "foxes-train-10"),
    ],
)  # fmt: skip
def test_a_run_is_named_after_the_folder_of_its_data(data, stem):
    assert run_stem(TrainConfig(data=data)) == stem


def test_an_unfinished_run_is_found_by_its_earlier_name_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos-20260101-000000", "train-20260202-000000", "other-20260303-000000"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert newest_unfinished(TrainConfig(data="photos/train")).name == "train-20260202-000000"
    assert newest_unfinished(TrainConfig(data="photos")).name == "photos-20260101-000000"


def test_a_refused_start_leaves_no_run_folder(photo_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert main(["train", str(photo_folder), "--model", "tinny"]) == 1
    assert "--model tinny: there is no such folder" in capsys.readouterr().err
    assert main(["train", str(photo_folder), "--model", "tinny", "--output", "mine"]) == 1
    assert "Did you mean tiny?" in capsys.readouterr().err
    assert list((tmp_path / "runs").iterdir()) == []
    assert (tmp_path / "mine").is_dir(), "a folder that was there stays"


ASK = """
import sys
from vlm_lora.errors import ModelError
from vlm_lora.model.folder import find_model
for name in sys.argv[1:]:
    try:
        find_model(name)
    except ModelError as error:
        print(error)
"""


def asked(*names: str, **environment: str) -> list[str]:
    """What `find_model` says of each name, in a process of its own: the hub's address is read once."""
    run = [sys.executable, "-c", ASK, *names]
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | environment
    return subprocess.run(
        run, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_no_network_a_mistyped_name_and_another_family_are_told_apart(tmp_path):
    hub = Hub()
    hub.repositories["me/llava"] = Repository(False, {"config.json": b'{"model_type": "llava"}', "x.safetensors": b"x"})
    told = asked("me/llava", "Qwen/Qwen2-VL-2B-Instruc", "me/none", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path))
    hub.shutdown()
    hub.server_close()
    assert "--model me/llava: is a model of another family (model_type 'llava')" in told[0]
    assert not any("safetensors" in request for request in hub.requests), "no weights of it were downloaded"
    assert "has no repository of this name that you may see" in told[1]
    assert "Did you mean Qwen/Qwen2-VL-2B-Instruct?" in told[1]
    assert "Did you mean" not in told[2]
    (told,) = asked("Qwen/Qwen2-VL-2B-Instruct", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path))
    assert "the model hub cannot be reached" in told
    assert "Did you mean" not in told


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash on this machine")
def test_bash_completes_commands_flags_choices_and_files(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "photos").mkdir()

    def completed(*words: str) -> list[str]:
        ask = "source ./script; COMP_WORDS=(vlm-lora {0}); COMP_CWORD={1}; _shtab_vlm_lora vlm-lora {2} x; "
        ask = ask.format(" ".join(words), len(words), words[-1]) + 'echo "${COMPREPLY[@]}"'
        return subprocess.run(["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True).stdout.split()

    assert completed("tr") == ["train"]
    assert completed("train", "--ep") == ["--epochs"]
    assert completed("train", "--method", "q") == ["qlora"]
    assert completed("train", "pho") == completed("caption", "--adapter", "pho") == ["photos"]
    assert completed("train", "--no-such") == []
