"""Every command and every line of Python in the README is run, on the embedded model and a folder like the reader's."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.conftest import ROOT, picture
from tests.forks import Forks

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders ``photos`` and ``photos-test`` (pictures and captions), ``more`` (pictures), as the README has them."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("photos", "photos-test", "more"):
        (folder / name).mkdir()
        for i in range(10 if name == "photos" else 3):
            picture(i + 10 * len(name), (64, 64)).save(folder / name / f"{i}.png")
            if name != "more":
                (folder / name / f"{i}.txt").write_text(f"Coloured blobs, number {i}.\n")
    return folder


@pytest.fixture(scope="module")
def vlm_lora(place):
    """Runs the command in that place; raises AssertionError where it fails."""
    forks = Forks()

    def run(*arguments):
        (ended,) = forks.run(1, *arguments, env={"VLM_LORA_CACHE": str(place / "cache")}, cwd=place)
        assert ended.code == 0, f"{arguments}\n{ended.err}"

    yield run
    forks.close()


def test_make_targets_exist():
    made = [command.split()[1] for command in commands() if command.startswith("make ")]
    assert {"quickstart", "test"} <= set(made)
    for target in made:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "pip install" in done.stdout or (ROOT / ".venv").exists()


def test_the_two_commands_come_first():
    assert commands()[:2] == ["make quickstart", "make test"]


def test_every_command_runs(vlm_lora):
    ran = 0
    for command in commands():
        words = shlex.split(command)
        if words[0] != "vlm-lora":
            assert words[0] in ("make", "pip", "git", "cd", "python"), command
            continue
        if words[1] == "demo":
            continue  # test_demo.py opens it
        if words[1] in ("train", "plan"):
            # The reader's first run downloads the default model; no machine of ours can.
            words += ["--max-steps", "2"] + ([] if "--model" in words else ["--model", "tiny"])
        vlm_lora(*words[1:])
        ran += 1
    assert ran >= 3


def test_the_python_runs(vlm_lora, place):
    if not (place / "runs/photos").exists():
        vlm_lora("train", "photos", "--model", "tiny", "--max-steps", "2", "--output", "runs/photos")
    environment = os.environ | {"VLM_LORA_CACHE": str(place / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    for code in blocks("python"):
        code = code.replace('TrainConfig(data="photos"', 'TrainConfig(model="tiny", max_steps=2, data="photos"')
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, f"{code}\n{done.stderr}"
        assert done.stdout.strip()


def test_the_file_tree_is_true():
    (tree,) = (block for block in blocks("text") if "pyproject.toml" in block)
    folder = ROOT
    named = set()
    for line in tree.splitlines():
        entry = line.split("  ")[0] if not line.startswith(" ") else line.strip().split("  ")[0]
        path = (folder if line.startswith(" ") else ROOT) / entry.strip()
        if not line.startswith(" ") and entry.strip().endswith("/"):
            folder = path
        assert path.exists(), line
        named.add(path.resolve())
    for path in (ROOT / "vlm_lora").iterdir():
        if path.name not in ("__pycache__", "py.typed", "__main__.py") and not path.name.startswith("."):
            assert path.resolve() in named, f"{path.name} is not in the README's tree"
