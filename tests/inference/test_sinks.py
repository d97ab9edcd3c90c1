"""What `caption` writes: nothing that was there is lost, and what cannot be written is said."""

import errno
import json
import os
from pathlib import Path

import pytest

from tests.conftest import picture
from vlm_lora.data.readers import read_dataset
from vlm_lora.errors import ConfigError, DataError
from vlm_lora.inference import sinks
from vlm_lora.inference.sinks import NotWritten, Rows, Sidecars, Stdout, one_line, printable

MADE_WITH = {"--prompt": None, "--adapter": ["runs/a"]}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(paths, format="jsonl", file="out", made_with=MADE_WITH, **how) -> Rows:
    return Rows([Path(path) for path in paths], format, Path(file), made_with=made_with, **how)


def write(sink, *names: str, text: str = "said") -> None:
    for name in names:
        sink.write(Path(name), [text])
    sink.close()


@pytest.mark.parametrize("format", ["text", "jsonl", "metadata"])
@pytest.mark.parametrize("foreign", ["my only line", "my only line\n", '{"mine": 1', "a.png is a picture"])
def test_a_file_that_is_not_ours_stays(here, format, foreign):
    (here / "out").write_text(foreign)
    with pytest.raises(ConfigError, match=f"out:1: is not a line that `caption --format {format}` wrote"):
        rows(["a.png"], format)
    with pytest.raises(ConfigError, match="this file stays as it is"):
        rows(["a.png"], format, overwrite=True)
    assert (here / "out").read_text() == foreign


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_table_of_something_else_stays(here, overwrite):
    foreign = "name\tprice\r\nscrew\t3\r\n"
    (here / "out").write_bytes(foreign.encode())
    with pytest.raises(ConfigError, match="out:1: is not a line that `caption --format text` wrote"):
        rows(["a.png"], "text", overwrite=overwrite)
    assert (here / "out").read_bytes() == foreign.encode()


def test_a_file_of_ours_may_name_what_does_not_look_like_an_image(here):
    for name in ("picture", "photo.dat"):
        write(rows([name], "text"), name)
    assert (here / "out").read_text() == "picture\tsaid\nphoto.dat\tsaid\n"
    (here / ".out.made-with").unlink()  # it was moved; then its lines are known by their names
    assert rows(["picture", "photo.dat"], "text").has(Path("picture"))
    (here / "out").write_text("b.png\tsaid\n")
    assert rows(["a.png", "b.png"], "text").has(Path("b.png"))


@pytest.mark.parametrize("other", ["metadata.csv", "metadata.parquet"])
def test_metadata_is_not_put_beside_metadata_of_another_kind(here, other):
    """A folder with both could not be read any more."""
    (here / other).write_text("file_name,text\na.png,mine\n")
    with pytest.raises(ConfigError, match=f"^metadata.jsonl: {other} lies beside it, and a folder with both"):
        rows(["a.png"], "metadata", "metadata.jsonl")
    assert os.listdir() == [other]
    rows(["a.png"], "metadata", "captions.jsonl")  # which no reader takes for metadata


@pytest.mark.parametrize("format", ["text", "jsonl", "metadata"])
def test_a_line_of_ours_that_was_cut_off_is_written_again(here, format):
    write(rows(["a.png", "b.png"], format), "a.png", "b.png")
    whole = (here / "out").read_text()
    for cut in range(whole.index("\n") + 1, len(whole)):
        (here / "out").write_text(whole[:cut])
        sink = rows(["a.png", "b.png"], format)
        assert sink.has(Path("a.png"))
        if not sink.has(Path("b.png")):
            write(sink, "b.png")
            assert (here / "out").read_text() == whole


def test_overwriting_one_image_keeps_the_rows_of_the_others(here):
    write(rows(["a.png", "b.png"]), "a.png", "b.png")
    write(rows(["b.png"], overwrite=True), "b.png", text="anew")
    told = [json.loads(line) for line in (here / "out").read_text().splitlines()]
    assert told == [{"image": "a.png", "caption": "said"}, {"image": "b.png", "caption": "anew"}]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_row_of_a_person_stays_until_its_image_has_a_new_caption(here, overwrite):
    own = [
        {"file_name": "gone.png", "text": "not here today", "error": None},
        {"file_name": "a.png", "text": "mine", "error": False},
        {"file_name": "a.png", "text": "mine too", "error": "what a tool wrote"},
        {"file_name": "damaged.png", "text": "all there is", "error": 0},
    ]
    file = here / "metadata.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in own))
    sink = rows(["a.png", "b.png", "damaged.png"], "metadata", "metadata.jsonl", overwrite=overwrite)
    if overwrite:
        sink.write(Path("a.png"), ["anew"])
    sink.write(Path("damaged.png"), None, "is damaged")
    write(sink, "b.png")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    replaced = [own[0], {"file_name": "a.png", "text": "anew"}, own[3]]
    assert found == [*(replaced if overwrite else own), {"file_name": "b.png", "text": "said"}]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("format", ["jsonl", "metadata"])
def test_what_a_person_left_between_the_lines_stays(here, format, end):
    """Blank lines, and the order of several lines of one image."""
    key = {"jsonl": "image", "metadata": "file_name"}[format]
    a, b, c, again = (f'{{"{key}": "{name}.png", "mine": 1}}' for name in "abca")
    before = end.join(["", a, "  ", b, again, "", c, "", ""])
    (here / "out").write_bytes(before.encode())
    write(rows(["d.png", "e.png"], format), "d.png", "e.png")
    after = (here / "out").read_bytes().decode()
    assert after.startswith(before)
    assert [json.loads(line)[key] for line in after.removeprefix(before).splitlines()] == ["d.png", "e.png"]
    write(rows(["a.png", "b.png"], format, overwrite=True), "a.png", "b.png", text="anew")
    *lines, _ = (here / "out").read_bytes().decode().split("\n")
    told = [json.loads(line)[key] if line.strip() else line.removesuffix("\r") for line in lines]
    assert told == ["", "a.png", "  ", "b.png", "", "c.png", "", "d.png", "e.png"]


def test_stopped_while_overwriting_the_rest_is_as_it_was(here):
    names = ["a.png", "b.png", "c.png"]
    write(rows(names), *names)
    before = (here / "out").read_text().splitlines()
    write(rows(names, overwrite=True), "a.png", text="anew")
    assert (here / "out").read_text().splitlines() == ['{"image": "a.png", "caption": "anew"}', *before[1:]]


def test_of_many_overwritten_none_is_missing_at_any_moment(here):
    names = [f"{i}.png" for i in range(50)]
    write(rows(names), *names)
    sink = rows(names, overwrite=True)
    for i, name in enumerate(names):
        sink.write(Path(name), ["anew"])
        lines = [json.loads(line) for line in (here / "out").read_text().splitlines()]
        assert [line["image"] for line in lines] == names
        assert lines[0]["caption"] == "anew"
        assert all(line["caption"] == "said" for line in lines[i + 1 :])
    sink.close()
    assert (here / "out").read_text().count("anew") == 50


def test_an_image_that_failed_is_tried_again_and_its_line_stays_until_then(here):
    sink = rows(["a.png", "b.png"])
    sink.write(Path("a.png"), None, "is damaged")
    sink.write(Path("b.png"), None, "is damaged")
    sink.close()
    again = rows(["a.png"])
    assert not again.has(Path("a.png"))
    write(again, "a.png")
    found = [json.loads(line) for line in (here / "out").read_text().splitlines()]
    assert found == [{"image": "a.png", "caption": "said"}, {"image": "b.png", "error": "is damaged"}]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("format", ["text", "jsonl", "metadata"])
def test_an_input_is_no_output(here, format, overwrite):
    for name in ("a.png", "list"):
        (here / name).write_text("")
    (here / "linked.png").symlink_to("a.png")
    for file in ("a.png", "linked.png", "list"):
        with pytest.raises(ConfigError, match="is one of the inputs, and would be overwritten; name another file"):
            rows(["b.png", "a.png"], format, file, overwrite=overwrite, inputs=[Path("list")])
    with pytest.raises(ConfigError, match=r"^cat.txt would hold a caption, and is one of the inputs"):
        Sidecars([Path("cat.jpg")], overwrite=overwrite, inputs=[Path("cat.txt")])


def test_a_reader_of_stdout_that_has_gone_is_no_full_disk():
    reading, writing = os.pipe()
    os.close(reading)
    sink = Stdout("text")
    sink.stream = os.fdopen(writing, "w")
    with pytest.raises(BrokenPipeError):
        sink.write(Path("a.png"), ["said"])
    with pytest.raises(BrokenPipeError):
        sink.stream.close()


def test_devices_and_folders_are_refused_and_links_are_followed(here):
    for wrong in ("/dev/null", "."):
        with pytest.raises(ConfigError, match="is not a regular file"):
            rows(["a.png"], file=wrong, overwrite=True)
    os.mkfifo("pipe")
    with pytest.raises(ConfigError, match="is not a regular file"):
        rows(["a.png"], file="pipe")
    (here / "link").symlink_to("target")
    write(rows(["a.png"], file="link"), "a.png")
    assert (here / "link").is_symlink()
    assert json.loads((here / "target").read_text()) == {"image": "a.png", "caption": "said"}
    (here / "a.png").write_bytes(b"")
    (here / "a.txt").symlink_to("mine")
    write(Sidecars([Path("a.png")], overwrite=True), "a.png")
    assert (here / "a.txt").is_symlink()
    assert (here / "mine").read_text() == "said\n"


def test_captions_made_with_something_else_are_not_mixed_in(here):
    write(rows(["a.png"]), "a.png")
    for other in ({"--prompt": "Why?", "--adapter": ["runs/a"]}, {"--prompt": None, "--adapter": ["runs/b"]}):
        with pytest.raises(ConfigError, match=r"out: its captions were made with --(prompt|adapter)"):
            rows(["b.png"], made_with=other)
        rows(["b.png"], made_with=other, overwrite=True)
    assert rows(["b.png"]).has(Path("a.png"))


def test_names_with_line_breaks_and_those_that_look_so_are_two(here):
    names = ["a\nb.png", "a\\nb.png", "a\\\nb.png", "a\\\\nb.png"]
    assert len({one_line(name) for name in names}) == len(names)
    write(rows(names[:1], "text"), names[0])
    assert [rows(names, "text").has(Path(name)) for name in names] == [True, False, False, False]


@pytest.mark.parametrize("name", ["a b.png", "Foo12:30.png", "IMG: 1.png", "file:x.png", "sub/c#?.png", "~$x.png"])
def test_metadata_loads_again(here, name):
    file = here / "in" / name
    file.parent.mkdir(parents=True)
    picture(0).save(here / "plain.png")
    (here / "plain.png").rename(file)
    write(rows([f"in/{name}"], "metadata", "in/metadata.jsonl"), f"in/{name}")
    read = read_dataset(here / "in", prompt="What?")
    assert [(e.images[0].path, e.dialogues[0].turns[0].assistant) for e in read.examples] == [(file, "said")]


def test_metadata_holds_no_name_that_cannot_be_read_back(here):
    sink = rows(["\udcff.png", "a.png"], "metadata", "metadata.jsonl")
    with pytest.raises(NotWritten, match="its name is not UTF-8, so that no training set can name it; rename it"):
        sink.write(Path("\udcff.png"), ["said"])
    write(sink, "a.png")
    assert (here / "metadata.jsonl").read_text() == '{"file_name": "a.png", "text": "said"}\n'


def test_a_full_disk_is_said_in_one_line(here):
    sink, out = rows(["a.png", "b.png"]), Stdout("jsonl")
    sink.write(Path("a.png"), ["said"])
    full = pytest.raises(DataError, match=r"^out: cannot be written \(No space left on device\)\.$")
    with open("/dev/full", "w") as sink.stream, full:
        sink.write(Path("b.png"), ["said"])
    with open("/dev/full", "w") as out.stream, pytest.raises(DataError, match=r"^stdout: cannot be written"):
        out.write(Path("a.png"), ["said"])  # and closed without a second failure
    assert json.loads((here / "out").read_text())["image"] == "a.png"


def test_stdout_of_another_encoding_and_what_steers_terminals(capsys, monkeypatch):
    assert printable("æ 🦊 \udcff", "latin-1") == "æ ? ?"
    Stdout("text", alone=True).write(Path("a.png"), ["one\ntwo \x1b[31m"])
    assert capsys.readouterr().out == "one\ntwo  [31m\n"


def test_a_caption_file_that_cannot_be_written_is_that_image_alone(here, monkeypatch):
    long = "x" * 250 + ".png"
    images = [Path(name) for name in ("folder.png", "latin.png", long, "full.png")]
    (here / "folder.txt").mkdir()
    (here / "latin.txt").write_bytes("mine: é\n".encode("latin-1"))
    sink = Sidecars(images, append=True)
    with pytest.raises(NotWritten, match=r"folder.txt cannot be written: Is a directory"):
        sink.write(images[0], ["said"])
    with pytest.raises(NotWritten, match=r"latin.txt is not UTF-8 \(byte 0xe9 at position 6\); save it as UTF-8"):
        sink.write(images[1], ["said"])
    sink.write(images[2], ["said"])
    assert (here / ("x" * 250 + ".txt")).read_text() == "said\n"

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(NotWritten, match=r"full.txt cannot be written: No space left on device"):
            sink.write(images[3], ["said"])
    assert sorted(os.listdir()) == ["folder.txt", "latin.txt", "x" * 250 + ".txt"]
    assert not Sidecars(images).has(images[0])


@pytest.mark.parametrize("name", ["a.TXT", "a.Txt", "a.Caption", "a.CAPTION", "a.caption", "a.png.txt"])
def test_a_caption_file_is_the_one_that_is_read(here, name):
    picture(0).save("a.png")
    (here / name).write_text("mine")
    assert Sidecars([Path("a.png")]).has(Path("a.png"))
    write(Sidecars([Path("a.png")], append=True), "a.png")
    assert (here / name).read_text() == "mine\nsaid\n"
    write(Sidecars([Path("a.png")], overwrite=True), "a.png", text="anew")
    assert set(os.listdir()) == {"a.png", name, f"{name}.old"}
    assert (here / f"{name}.old").read_text() == "mine\nsaid\n"
    write(Sidecars([Path("a.png")], overwrite=True), "a.png", text="once more")
    assert (here / f"{name}.old").read_text() == "mine\nsaid\n"
    assert (here / f"{name}.old2").read_text() == "anew\n"
    read = read_dataset(here, prompt="What?")
    assert (read.bad, read.examples[0].dialogues[0].turns[0].assistant) == ((), "once more")


@pytest.mark.parametrize("end", ["", "\r\n"])
def test_appending_keeps_a_files_line_ends(here, end):
    (here / "a.txt").write_bytes(b"one\r\ntwo" + end.encode())
    for _ in range(2):
        write(Sidecars([Path("a.png")], append=True), "a.png", text="three\nlines")
    assert (here / "a.txt").read_bytes() == b"one\r\ntwo\r\nthree\r\nlines\r\n"


def test_an_image_never_becomes_its_caption(here):
    for images in (["pic.txt"], ["pic.txt", "pic.png"]):
        with pytest.raises(ConfigError, match=r"^pic.txt would hold a caption, and is one of the inputs; rename it"):
            Sidecars([Path(name) for name in images], overwrite=True)


@pytest.mark.parametrize(("takes", "pause"), [(1.0, 20.0), (0.001, 1.0)])
def test_a_file_whose_lines_change_is_rewritten_now_and_then(here, monkeypatch, takes, pause):
    """A twentieth of the time at most, and once a second: or a long file would be written anew for each caption."""
    names = [f"{i}.png" for i in range(200)]
    write(rows(names), *names)
    now, rewritten, replace_text = [100.0], [], sinks.replace_text

    def slowly(path: Path, text: str) -> None:
        if path == Path("out"):
            rewritten.append(now[0])
            now[0] += takes
        replace_text(path, text)

    monkeypatch.setattr(sinks, "replace_text", slowly)
    monkeypatch.setattr(sinks.time, "monotonic", lambda: now[0])
    sink = rows(names, overwrite=True)
    for name in names:
        sink.write(Path(name), ["anew"])
        now[0] += 0.5
    sink.close()
    first, second, *later = rewritten
    assert second - first == pytest.approx(takes + 0.5)  # the first makes the file ready
    assert all(after - before >= takes + pause for before, after in zip([second, *later], later[:-1], strict=False))
    assert 200 * 0.5 / (pause + takes + 0.5) <= len(rewritten) <= 200 * 0.5 / pause + 4
    assert all('"anew"' in line for line in (here / "out").read_text().splitlines())
