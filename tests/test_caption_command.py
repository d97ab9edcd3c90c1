"""`vlm-lora caption`: what goes in, what comes out, exit codes, and going on where a run was stopped."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.conftest import picture
from vlm_lora.cli import main
from vlm_lora.config import TrainConfig
from vlm_lora.data.readers import read_dataset
from vlm_lora.inference.captioner import Captioner, Decoding
from vlm_lora.model.adapters.methods import attach_adapter
from vlm_lora.model.backbone import load_backbone

HOSTILE = [
    "line\nbreak.png",
    "-leading-dash.png",
    "\u202ertl.png",
    "fox 🦊 tab\t.png",
    "back\\slash.png",
    "quote'\".png",
]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, checkpoints):
    """Two adapters on one base that say different things."""
    folders = []
    for seed in (1, 2):
        backbone = load_backbone(str(checkpoints["qwen2_vl"]))
        adapter = attach_adapter(backbone, TrainConfig(data="none", rank=2, alpha=8, seed=seed, prompt="Say it."))
        for _, parameter in adapter.named_parameters():
            parameter.data += 0.3 * seed
        folders.append(tmp_path_factory.mktemp("adapters") / f"{seed}")
        adapter.save(folders[-1])
    return folders


@pytest.fixture
def caption(adapters, monkeypatch, tmp_path):
    """The command with the first adapter, run in ``tmp_path``. The base is loaded once, not once a command."""
    monkeypatch.chdir(tmp_path)
    loaded = {}

    def load_once(cls, model, adapters, **how):
        key = (model, *map(str, adapters))
        if key not in loaded:
            loaded[key] = load(model, adapters, **how)
        return loaded[key]

    load = Captioner.load_several
    monkeypatch.setattr(Captioner, "load_several", classmethod(load_once))
    return lambda *words: main(["caption", *words, "--adapter", str(adapters[0]), "--max-new-tokens", "4"])


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for i, name in enumerate(["b.png", "a.png", "below/c.png", ".hidden.png"]):
        picture(i).save(folder / name)
    (folder / "notes.md").write_text("no image")
    return folder


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_files_folders_patterns_lists_and_stdin(caption, folder, capsys, monkeypatch):
    def listed(*words) -> list[str]:
        assert caption(*words, "--dry-run") == 0
        out, err = capsys.readouterr()
        assert err == f"{len(out.splitlines()):,} images would be captioned.\n"
        return out.splitlines()

    assert listed("photos") == ["photos/a.png", "photos/b.png"]
    assert listed("photos", "--recursive") == ["photos/a.png", "photos/b.png", "photos/below/c.png"]
    assert listed("photos/*.png") == ["photos/a.png", "photos/b.png"]
    assert listed("photos/**/c.png") == ["photos/below/c.png"]
    assert listed("photos/b.png", "photos") == ["photos/b.png", "photos/a.png"]  # none twice
    assert listed("*") == listed("photos") == ["photos/a.png", "photos/b.png"]  # folders of a pattern are entered
    assert listed("photos/notes.md") == ["photos/notes.md"]  # who names a file means it
    (folder / "list").write_text("photos/b.png\r\nphotos/below\n")
    assert listed("--list", "photos/list") == ["photos/b.png", "photos/below/c.png"]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"photos/a.png\0photos/b.png\0")))
    assert listed("-") == ["photos/a.png", "photos/b.png"]


def test_a_name_that_looks_like_a_home(caption, tmp_path, monkeypatch, capsys):
    picture(0).save(tmp_path / "~$photo.png")
    assert caption(".", "--format", "jsonl") == 0
    assert [set(row) for row in rows(capsys.readouterr().out)] == [{"image", "caption"}]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert caption("~/*.png", "--dry-run") == 0
    assert capsys.readouterr().out == f"{tmp_path}/~$photo.png\n"


def test_one_sidecar_that_cannot_be_written_stops_no_other(caption, folder, capsys):
    (folder / "a.txt").mkdir()
    assert caption("photos", "--format", "sidecar") == 3
    err = capsys.readouterr().err.splitlines()
    assert "photos/a.png: a.txt cannot be written: it is a folder or a device; expected a file" in err
    assert err[-1] == "1 of 2 images could not be captioned."
    assert (folder / "b.txt").is_file()


def test_hostile_names_come_out_as_they_are(caption, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i, name in enumerate(HOSTILE):
        picture(i).save(tmp_path / "in" / name)
    shutil.copy(tmp_path / "in" / HOSTILE[0], os.fsencode(tmp_path / "in") + b"/\xff not utf-8.png")
    assert caption("in", "--format", "jsonl", "--output", "out.jsonl") == 0
    written = rows((tmp_path / "out.jsonl").read_text(encoding="utf-8"))
    assert sorted(row["image"] for row in written) == sorted(f"in/{n}" for n in [*HOSTILE, "\udcff not utf-8.png"])
    assert caption("in") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(HOSTILE) + 1
    assert all(line.count("\t") == 1 for line in lines)
    assert "in/line\\nbreak.png" in {line.split("\t")[0] for line in lines}
    shutil.copy(tmp_path / "in" / HOSTILE[1], tmp_path / HOSTILE[1])
    command = ["caption", "--max-new-tokens", "2", "--model", "tiny", "--", HOSTILE[1]]
    assert main(command) == 0
    assert "\t" not in capsys.readouterr().out


def test_bad_images_each_have_their_error(caption, tmp_path, capsys):
    picture(0).save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    bad = {
        "cut.png": (whole[: len(whole) // 2], "'cut.png' is damaged or cut off"),
        "empty.png": (b"", "'empty.png' is empty (0 bytes); copy or download it again"),
        "text.jpg": (b"hello", "'text.jpg' is not an image that can be read (it starts with b'hello'); expected "),
        "vector.svg": (b"<svg></svg>", "'vector.svg' is an SVG drawing, which has no pixels; render it to PNG first"),
    }
    for name, (data, _) in bad.items():
        (tmp_path / name).write_bytes(data)
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    os.mkfifo(tmp_path / "pipe.png")
    names = [*bad, "huge.png", "pipe.png", "good.png"]
    assert caption(*names, "--format", "jsonl") == 3
    out, err = capsys.readouterr()
    told = {row["image"]: row for row in rows(out)}
    assert list(told) == names
    assert set(told["good.png"]) == {"image", "caption"}
    for name, (_, message) in bad.items():
        assert set(told[name]) == {"image", "error"}
        assert told[name]["error"].startswith(message)
    huge = "'huge.png' has 9000x9000 = 81 megapixels, the limit is 50; scale it down, or set VLM_LORA_MAX_MEGAPIXELS"
    assert told["huge.png"]["error"] == f"{huge} (up to 178)"
    assert told["pipe.png"]["error"] == "'pipe.png' is not a regular file; expected an image file"
    assert err.splitlines()[-1] == "6 of 7 images could not be captioned."
    assert caption("empty.png") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0] == f"empty.png: {bad['empty.png'][1]}"


def test_metadata_is_a_training_set(caption, folder, tmp_path, capsys):
    (folder / "broken.png").write_bytes(b"nothing")
    command = ("photos", "--recursive", "--format", "metadata", "--prefix", "zwx, ", "--suffix", "!")
    assert caption(*command) == 3
    captions = {row["file_name"]: row["text"] for row in rows((folder / "metadata.jsonl").read_text())}
    assert list(captions) == ["a.png", "b.png", "below/c.png"]
    assert all(text.startswith("zwx, ") and text.endswith("!") for text in captions.values())
    dataset = read_dataset(folder, prompt="Describe this image.")
    read = {e.images[0].name: e.dialogues[0].turns[0].assistant for e in dataset.examples}
    assert read == captions
    capsys.readouterr()
    assert caption("photos/a.png", "--format", "metadata") == 2
    assert "say with --output where" in capsys.readouterr().err


def test_sidecars_are_skipped_replaced_or_added_to(caption, folder, capsys):
    (folder / "a.txt").write_text("mine")
    (folder / "b.caption").write_text("mine too")
    assert caption("photos", "--format", "sidecar") == 0
    assert capsys.readouterr().err.startswith("2 images have a caption already")
    for _ in range(2):  # the second time, after a stop, finds its line there
        assert caption("photos", "--format", "sidecar", "--append") == 0
        first, second, *more = (folder / "a.txt").read_text().splitlines()
        assert (first, more) == ("mine", [])
    assert second
    assert caption("photos", "--format", "sidecar", "--overwrite") == 0
    assert (folder / "a.txt").read_text() == second + "\n"
    assert "mine" not in (folder / "b.caption").read_text()
    assert sorted(p.name for p in folder.iterdir() if p.suffix == ".txt") == ["a.txt"]


def test_a_file_is_gone_on_with(caption, folder, tmp_path, capsys):
    command = ("photos", "--format", "jsonl", "--output", "out.jsonl")
    (folder / "broken.png").write_bytes(b"nothing")
    assert caption(*command) == 3
    whole = (tmp_path / "out.jsonl").read_text()
    first, second, error = whole.splitlines()
    assert "error" in error
    picture(7).save(folder / "broken.png")  # mended: what failed is tried again
    (tmp_path / "out.jsonl").write_text(f"{first}\n{error}\n{second[:20]}")
    assert caption(*command) == 0
    again = rows((tmp_path / "out.jsonl").read_text())
    # A line that failed keeps its place
    assert [row["image"] for row in again] == ["photos/a.png", "photos/broken.png", "photos/b.png"]
    assert all("caption" in row for row in again)
    assert again[::2] == rows(f"{first}\n{second}")
    before = (tmp_path / "out.jsonl").read_text()
    capsys.readouterr()
    assert caption(*command) == 0
    assert capsys.readouterr().err == "3 images have a caption already; --overwrite captions them again.\n"
    assert (tmp_path / "out.jsonl").read_text() == before
    assert caption(*command, "--num-beams", "2") == 2  # would be others
    assert "its captions were made with --num-beams 1, now it is 2" in capsys.readouterr().err
    (tmp_path / "out.jsonl").write_text(before.rstrip("\n"))  # as an editor leaves it: nothing is lost
    assert caption(*command) == 0
    assert (tmp_path / "out.jsonl").read_text().rstrip("\n") == before.rstrip("\n")
    (tmp_path / "out.jsonl").write_text("my diary\n")
    assert caption(*command) == 2
    assert "out.jsonl:1: is not a line that `caption --format jsonl` wrote" in capsys.readouterr().err
    assert caption(*command, "--overwrite") == 2
    assert (tmp_path / "out.jsonl").read_text() == "my diary\n"


def test_killed_and_said_again_none_is_missed_and_none_comes_twice(checkpoints, tmp_path):
    """200 images, SIGKILL in the middle."""
    (tmp_path / "in").mkdir()
    for i in range(200):
        picture(i, (32, 32)).save(tmp_path / f"in/{i:03}.png")
    out = tmp_path / "out.jsonl"
    command = ["caption", str(tmp_path / "in"), "--model", str(checkpoints["qwen2_vl"]), "--format", "jsonl"]
    command += ["--output", str(out), "--max-new-tokens", "2", "--batch-size", "4"]
    process = subprocess.Popen([sys.executable, "-m", "vlm_lora", *command], stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out.exists() and out.read_text().count("\n") >= 60):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = out.read_text()
    assert 60 <= before.count("\n") < 200
    assert main(command) == 0
    assert out.read_text().startswith(before[: before.rindex("\n") + 1])
    assert [row["image"] for row in rows(out.read_text())] == [str(tmp_path / f"in/{i:03}.png") for i in range(200)]


def test_adapters_side_by_side(caption, adapters, folder, checkpoints, capsys):
    both = ["--adapter", "base", "--adapter", str(adapters[1]), "--format"]
    assert caption("photos", *both, "jsonl") == 0
    names = ["base", str(adapters[1]), str(adapters[0])]  # the fixture adds the last
    told = rows(capsys.readouterr().out)
    assert [list(row["captions"]) for row in told] == [names, names]
    short = Decoding(max_new_tokens=4)
    for name, source in zip(names, [None, adapters[1], adapters[0]], strict=True):
        alone = Captioner.load(str(checkpoints["qwen2_vl"]), source, prompt=None if source else "Say it.")
        texts = [c.text for c in alone.caption(["photos/a.png", "photos/b.png"], decoding=short)]
        assert [row["captions"][name] for row in told] == texts
    assert caption("photos", *both, "text") == 0
    out, err = capsys.readouterr()
    assert [line.count("\t") for line in out.splitlines()] == [3, 3]
    assert err.startswith(f"Columns: image, {', '.join(names)}\n")
    first = out.splitlines()[0]
    assert caption("photos/a.png", *both, "text") == 0  # one image alone leaves none of them out
    assert capsys.readouterr().out == first + "\n"
    assert caption("photos", *both, "sidecar") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no images given"),
        (["a.png", "--batch-size", "0"], "--batch-size is 0; expected 1 or more images, or auto"),
        (["a.png", "--prefix", "\udcff"], "--prefix holds bytes that are not UTF-8; expected text"),
        (["a.png", "--temperature", "nan"], "--temperature is nan; expected 0 (greedy) or a number from 1e-06 on"),
        (["a.png", "--temperature", "1e-40"], "--temperature is 1e-40; expected 0 (greedy) or a number from"),
        (["a.png", "--output", "/dev/null", "--overwrite"], "--output /dev/null: is not a regular file"),
        (["a.png", "--append"], "--append adds to the files of --format sidecar"),
        (["a.png", "--overwrite"], "--overwrite is for --output FILE"),
        (["a.png", "--num-beams", "2", "--temperature", "1"], "give one of the two"),
        (["a.png", "--endpoint", "localhost:8000", "--num-beams", "2"], "--endpoint cannot do --num-beams, for"),
        (["a.png", "--endpoint", "localhost:8000", "--adapter", "x", "--adapter", "y"], "the server holds the model"),
        (
            ["a.png", "--endpoint", "localhost:8000", "--avoid", "x", "--words", "1..2", "--begin-with", "y"],
            "--endpoint cannot do --begin-with, --avoid, --words, for which the model has to be loaded here",
        ),
        (["a.png", "--words", "5"], "--words is '5'; expected the least and the most, as 10..30."),
        (["a.png", "--words", "5..2"], "--words is 5..2; expected a range such as 10..30."),
        (["a.png", "--top-k", "5"], "--top-k is about what is drawn; give a --temperature above 0 too."),
        (["a.png", "--avoid", "a cat,dog", "--begin-with", "A Dog"], "--begin-with asks for 'dog', which is to be"),
        (["a.png", "--avoid", "dog", "--require", "big dog"], "--require asks for 'dog', which is to be avoided"),
        (["a.png", "--avoid-file", "gone"], "--avoid-file gone: cannot be read (No such file or directory)."),
        (["a.png", "--repetition-penalty", "0"], "--repetition-penalty is 0.0; expected a number above 0"),
        (["a.png", "--endpoint", "localhost:8000"], "expected a URL such as"),
        (["a.png", "--format", "sidecar", "--output", "x"], "leave out --output"),
        (["a.png", "--output", "gone/x"], "--output gone/x: there is no folder gone; make it first"),
        (["--list", "gone"], "--list gone: cannot be read"),
        (["new\nline.png"], "new\\nline.png: there is no such file or folder"),
    ],
)
def test_what_does_not_go_together_is_said_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture(0).save("a.png")
    assert main(["caption", "--model", "tiny", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err


def test_an_adapter_from_the_hub(adapters, tmp_path, monkeypatch, capsys):
    """As the hub's cache on this machine holds it; tests are offline."""
    revision = "0" * 40
    home = tmp_path / "models--me--photos"
    (home / "refs").mkdir(parents=True)
    (home / "refs/main").write_text(revision)
    shutil.copytree(adapters[0], home / "snapshots" / revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    picture(0).save(tmp_path / "a.png")
    command = ["caption", str(tmp_path / "a.png"), "--max-new-tokens", "4", "--adapter"]
    assert main([*command, "me/photos"]) == 0
    told = capsys.readouterr().out
    assert main([*command, str(adapters[0])]) == 0
    assert told == capsys.readouterr().out
    assert main([*command, "me/gone"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "--adapter me/gone: there is no such folder, and HF_HUB_OFFLINE forbids a download" in err
