"""What the Train tab takes in and refuses, and the process that it starts; the walk in a browser is in another file."""

import json
import os
import stat
import sys
import time
import zipfile
from pathlib import Path

import httpx
import pytest

from tests.conftest import picture
from tests.test_demo import Parrot, loaded, serve
from vlm_lora import ImageRef
from vlm_lora.cli import main
from vlm_lora.demo import build_app, folders, training
from vlm_lora.demo.folders import Album, Roots
from vlm_lora.demo.training import State, Trainer, _in_words, _told
from vlm_lora.errors import ConfigError, DataError

HTML = "<img src=x onerror=alert(1)>"


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        picture(i, (32, 32)).save(folder / f"{i}.png")
    for i in range(2):
        (folder / f"{i}.txt").write_text(f"Number {i}.")
    return folder


def sent(path: Path, name: str | None = None) -> ImageRef:
    return ImageRef(path=path, name=name or path.name)


def zipped(path: Path, members: dict[str, bytes], mode: int = 0, flags: int = 0) -> ImageRef:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in members.items():
            member = zipfile.ZipInfo(name)
            member.compress_type, member.external_attr = zipfile.ZIP_DEFLATED, mode << 16
            packed.writestr(member, data)
    if flags:  # in the directory at the end
        data = bytearray(path.read_bytes())
        data[data.rindex(b"PK\x01\x02") + 8] |= flags
        path.write_bytes(data)
    return sent(path)


@pytest.mark.parametrize(
    ("members", "how", "told"),
    [
        ({"../out.txt": b"x"}, {}, "leads out of the folder"),
        ({"a/../../out.txt": b"x"}, {}, "leads out of the folder"),
        ({"/etc/out.txt": b"x"}, {}, "leads out of the folder"),
        ({"..\\out.txt": b"x"}, {}, "leads out of the folder"),
        ({"c:/out.txt": b"x"}, {}, "leads out of the folder"),
        ({"a.txt": b"/etc/passwd"}, {"mode": stat.S_IFLNK | 0o777}, "is a link"),
        ({"a.txt": b"x"}, {"flags": 1}, "has a password"),
        ({"a.txt": b"x" * 5000}, {}, "too much at once"),
        ({f"{i}.txt": b"" for i in range(9)}, {}, "too much at once"),
        ({"run.py": b"x"}, {}, "neither a picture nor a text"),
        ({"in.zip": b"x"}, {}, "neither a picture nor a text"),
        ({"a": b"x"}, {}, "neither a picture nor a text"),
    ],
)
def test_a_zip_that_means_harm_is_refused_and_leaves_nothing(tmp_path, monkeypatch, members, how, told):
    monkeypatch.setattr(folders, "MOST_BYTES", 4000)
    monkeypatch.setattr(folders, "MOST_FILES", 8)
    with pytest.raises(DataError, match=told):
        Roots([], tmp_path / "in").take_in([zipped(tmp_path / "x.zip", members, **how)])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "x.zip"]


def test_a_zip_that_lies_about_its_size_is_cut_short(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "MOST_BYTES", 4000)
    sent_zip = zipped(tmp_path / "x.zip", {"a.txt": b"x" * 1_000_000})
    data = sent_zip.path.read_bytes().replace((1_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    sent_zip.path.write_bytes(data)
    with pytest.raises(DataError):
        Roots([], tmp_path / "in").take_in([sent_zip])
    assert list((tmp_path / "in").iterdir()) == []


def test_pictures_texts_and_zips_are_taken_in_together(photos, tmp_path):
    packed = zipped(tmp_path / "x.zip", {"more/9.png": (photos / "2.png").read_bytes(), "more/9.txt": b"Nine."})
    roots = Roots([], tmp_path / "in")
    album = roots.album(roots.take_in([sent(photos / "0.png"), sent(photos / "0.txt"), packed]), rows=False)
    assert album.captions(album.pictures) == {"0.png": "Number 0.", "more/9.png": "Nine."}
    with pytest.raises(DataError, match="is there twice"):
        roots.take_in([sent(photos / "0.png"), sent(photos / "1.png", "0.png")])
    broken = tmp_path / "broken.zip"
    broken.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(DataError, match="cannot be unpacked"):
        roots.take_in([sent(broken)])


def test_only_what_is_below_a_root_is_read(photos, tmp_path):
    (photos / "inner").mkdir()
    (photos / "inner/a.png").write_bytes(b"")
    (photos / "out").symlink_to("/etc")
    (photos / ".hidden").mkdir()
    (photos / ".hidden/a.png").write_bytes(b"")
    roots = Roots([photos], tmp_path / "uploads")
    assert roots.names() == ["photos", "photos/inner"]
    assert roots.folder("photos/inner") == photos / "inner"
    for name in (
        "",
        "..",
        "photos/..",
        "photos/out",
        "photos/inner/../..",
        "/etc",
        str(tmp_path),
        "photos/\0",
        "photos/0.png",
    ):
        with pytest.raises(DataError, match="no folder that the demo may read"):
            roots.folder(name)


COMMAND = """
import json, pathlib, sys, time
run = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
run.mkdir(exist_ok=True)
(run / "config.yaml").write_text("data: x")
print("20 steps over 40 answers.", file=sys.stderr, flush=True)
(run / "metrics.jsonl").write_text(json.dumps({"step": 7, "loss": 1.5, "lr": 1}) + "\\n")
print("step 7/20  loss 1.5000  lr 1.0e-04  5.2 answers/s  1 min 05 s left", file=sys.stderr, flush=True)
if sys.argv[2] == "wait":
    time.sleep(60)
if sys.argv[2] == "fail":
    sys.exit("vlm-lora: the data is gone; put it back.")
(run / "adapter").mkdir()
(run / "adapter/adapter_config.json").write_text("{}")
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Where a command trains that does what it is told to."""
    (tmp_path / "command.py").write_text(COMMAND)
    monkeypatch.setattr(training, "COMMAND", (sys.executable, str(tmp_path / "command.py")))
    return tmp_path / "runs"


def until(true, seconds: float = 30.0):
    end = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def test_a_run_goes_on_without_the_demo_and_there_is_one_at_a_time(place):
    assert Trainer(place).state() is None
    Trainer(place).start("photos-1", ["wait"])
    later = Trainer(place)  # of a demo that was started anew
    state = until(lambda: (s := later.state()) and s.step and s.said and s)
    assert state == State("photos-1", "learning", 7, 20, "about 1 min 05 s left")
    for begin in (lambda: later.start("photos-2", ["wait"]), lambda: later.resume()):
        with pytest.raises(ConfigError):
            begin()
    later.stop()
    until(lambda: later.state().kind == "stopped")
    with pytest.raises(ConfigError, match="Nothing is being trained"):
        later.stop()


def test_how_a_run_has_ended(place):
    demo = Trainer(place)
    demo.start("photos-1", ["done"])
    until(lambda: demo.state().kind == "done")
    with pytest.raises(ConfigError, match="no run to go on with"):
        demo.resume()
    demo.start("photos-2", ["fail"])
    state = until(lambda: (s := demo.state()).kind == "failed" and s)
    assert (state.name, state.said) == ("photos-2", "the data is gone; put it back.")
    (place / "photos-3").mkdir()  # begun on the command line since, and not done
    os.utime(place / "photos-2.train.json", (1, 1))
    os.utime(place / "photos-2/config.yaml", (1, 1))
    (place / "photos-3/config.yaml").write_text("data: x")
    assert demo.state() == State("photos-3", "stopped")


def test_another_process_with_its_number_is_not_the_run(place):
    demo = Trainer(place)
    demo.start("photos-1", ["fail"])
    until(lambda: demo.state().kind == "failed")
    record = {"pid": os.getpid(), "began": 1.0}
    (place / "photos-1.train.json").write_text(json.dumps(record))
    assert demo.state().kind == "failed"
    with pytest.raises(ConfigError):
        demo.stop()


def test_what_is_said_of_a_run_and_of_data_is_text(photos):
    said = _told(State(f"run{HTML}", "failed", 1, 2, HTML), None)
    bad = {"source": f"a/{HTML}", "line": None, "reason": HTML}
    group = {"count": 1, "first": []}
    facts = {"images": 1, "answers": 1, "bad": [bad] * 7, "repeated": [[HTML, 3]], "duplicates": group}
    said += _in_words(facts | {"near_duplicates": group}, "", Album(photos, rows=False))
    assert "<img" not in said
    assert said.count("&lt;img") == 14
    assert "And 2 more" in said


def test_what_is_not_there_is_told_once_and_nothing_promised(photos):
    reason = "no row of metadata.jsonl names this image; add one, or remove it"
    facts = {"images": 1, "answers": 1, "bad": [{"source": "2.png", "line": None, "reason": reason}]}
    said = _in_words(facts, "", Album(photos, rows=True))
    assert "3 have no caption" in said
    assert "no row of" not in said
    assert "Resume goes on" in _told(State("run", "stopped", 1, 2), None)
    assert "saved: Resume" not in _told(State("run", "stopped"), None)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--host", "0.0.0.0", "--no-auth", "--roots", "."], "say --allow-training"),
        (["--allowed-host", "demo.example", "--roots", "."], "say --allow-training"),
        (["--roots", "nowhere"], "there is no such folder"),
        (["--roots", ".", "--roots", "."], "two folders of one name"),
    ],
)
def test_who_is_elsewhere_trains_only_where_that_is_allowed(flags, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *flags]) == 2
    assert told in capsys.readouterr().err


def test_the_page_trains_only_for_its_own_pages_and_where_it_may(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))

    def labels(app) -> set:
        return {each["props"].get("value") for each in app.config["components"] if each["type"] == "button"}

    closed = build_app(loaded(Parrot()))
    assert "Train" not in labels(closed)
    closed.close()
    app = serve(build_app(loaded(Parrot()), roots=Roots([], tmp_path / "runs/uploads")))
    try:
        assert "Train" in labels(app)
        asked = {"data": [None, None], "fn_index": 0, "session_hash": "x"}
        for path, what in (("queue/join", {"json": asked}), ("upload", {"files": {"files": ("a.zip", b"PK")}})):
            url, origin = f"{app.local_url}gradio_api/{path}", {"Origin": "https://evil.example"}
            assert httpx.post(url, headers=origin, **what).status_code == 403
            assert httpx.post(url, headers={"Host": "evil.example"}, **what).status_code == 400
    finally:
        app.close()
    assert not (tmp_path / "runs").exists()
