"""The project's fault table, F11 to F27 and F30 to F36: a row for each fault, with the message it gives.

Each fault is put into a data set beside a good row; `check_dataset` is to keep the good row, and to name the fault
with its file and line, in these words. Run: pytest tests/data/test_fault_table.py -v
"""

import json
import os
import pickle
import re
import tarfile
from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import Image

from tests.data.test_images import JPEG, encoded, png_of_size
from tests.data.test_shards import Bomb, write_tar
from vlm_lora.check.dataset import check_dataset
from vlm_lora.cli import main
from vlm_lora.data.images import load_image
from vlm_lora.data.readers import read_dataset
from vlm_lora.errors import ConfigError, DataError

GOOD = b'{"image": "a.png", "caption": "a fox"}\n'


@dataclass(frozen=True)
class Fault:
    name: str
    """F and a number, a letter where there are several, and what it is."""
    lines: bytes = b""
    """Behind the good row of rows.jsonl; where empty, a row about `file`."""
    file: str = "x.png"
    content: bytes | None = None
    bad: tuple[str, ...] = ()
    """What the bad rows say; none where the row is good."""
    colour: tuple[int, int, int] | None = None
    """Of the upper right corner of the picture, where it is good."""
    options: dict = field(default_factory=dict)


def row(image, caption="x"):
    return json.dumps({"image": image, "caption": caption}, ensure_ascii=False).encode() + b"\n"


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (64, 32), "red")
    picture.paste("blue", (0, 0, 32, 32))  # left; upright it is the upper half
    return encoded(picture, exif=exif)


def animated(format="GIF"):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "lime")]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:])


GRAY16 = encoded(Image.fromarray(np.full((8, 8), 32768, np.uint16)))
FLOATS = encoded(Image.fromarray(np.full((8, 8), 0.5, np.float32)), "TIFF")
CLEAR = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
HIDDEN = Image.new("P", (8, 8), 0)
HIDDEN.putpalette([255, 0, 0])
DAMAGED = "'x.png' is damaged or cut off"
URL = "is a URL, which is not fetched; download it and write its file name here"
OUTSIDE = "lies outside of the data folder; move it there, or pass --allow-outside to trust it"
CANNOT = "cannot be fetched: {} is {}, which is no public address; download it yourself, or remove the row"

FAULTS = [
    Fault("F11 a truncated JPEG", content=JPEG[: len(JPEG) // 2], bad=(DAMAGED,)),
    Fault("F12a zero bytes", content=b"", bad=("'x.png' is empty (0 bytes); copy or download it again",)),
    Fault(
        "F12b text named .png",
        content=b"a text",
        bad=("'x.png' is not an image that can be read (it starts with b'a text')",),
    ),
    Fault("F12c a JPEG named .png", content=encoded(Image.new("RGB", (8, 8), "blue"), "JPEG"), colour=(0, 0, 254)),
    Fault(
        "F13a a bomb of 144 megapixels",
        content=png_of_size(12000, 12000),
        bad=("144 megapixels, the limit is 50; scale it down",),
    ),
    Fault(
        "F13b a bomb of 900 megapixels",
        content=png_of_size(30000, 30000),
        bad=("'x.png' has 900 megapixels, the limit is 50",),
    ),
    Fault("F14 one pixel", content=encoded(Image.new("RGB", (1, 1), "blue")), colour=(0, 0, 255)),
    Fault("F15a a ratio of 201", content=encoded(Image.new("RGB", (1, 201), "blue")), colour=(0, 0, 255)),
    Fault("F15b a ratio of 10,000", content=encoded(Image.new("RGB", (1, 10_000), "blue")), colour=(0, 0, 255)),
    Fault("F16 a legal ratio of 192", content=encoded(Image.new("RGB", (5000, 26), "blue")), colour=(0, 0, 255)),
    Fault("F17 turned by EXIF", content=turned(), colour=(0, 0, 255)),
    Fault("F18a 16 bits of gray", content=GRAY16, colour=(128, 128, 128)),
    Fault("F18b floats", content=FLOATS, colour=(128, 128, 128)),
    Fault(
        "F18c floats that are none",
        content=encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"),
        bad=("'x.png' holds NaN or infinite pixel values; write it with finite ones",),
    ),
    Fault("F19a transparent red", content=encoded(CLEAR), colour=(255, 255, 255)),
    Fault("F19b transparent gray", content=encoded(CLEAR.convert("LA")), colour=(255, 255, 255)),
    Fault("F19c a transparent palette", content=encoded(HIDDEN, transparency=0), colour=(255, 255, 255)),
    Fault("F20a CMYK", content=encoded(Image.new("CMYK", (8, 8), (255, 255, 0, 0)), "TIFF"), colour=(0, 0, 255)),
    Fault("F20b one bit", content=encoded(Image.new("1", (8, 8), 1)), colour=(255, 255, 255)),
    Fault("F20c a palette", content=encoded(HIDDEN), colour=(255, 0, 0)),
    Fault("F21a an animated GIF", content=animated(), colour=(255, 0, 0)),
    Fault("F21b an animated WebP", content=animated("WEBP"), colour=(255, 0, 0)),
    Fault("F22a AVIF", content=encoded(Image.new("RGB", (16, 16), "white"), "AVIF"), colour=(255, 255, 255)),
    Fault("F22b WebP", content=encoded(Image.new("RGB", (16, 16), "white"), "WEBP"), colour=(255, 255, 255)),
    Fault(
        "F22c HEIC",
        content=b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        bad=("'x.png' is a HEIC/HEIF image; `pip install pillow-heif`|damaged",),
    ),
    Fault(
        "F22d SVG",
        content=b'<svg xmlns="x"/>',
        bad=("'x.png' is an SVG drawing, which has no pixels; render it to PNG first",),
    ),
    Fault("F23a ..", row("../outside.png"), bad=(f"'../outside.png' {OUTSIDE}",)),
    Fault("F23b an absolute name", row("/etc/hostname"), bad=(f"'/etc/hostname' {OUTSIDE}",)),
    Fault("F23c file://", row("file:///etc/hostname"), bad=(OUTSIDE,)),
    Fault("F23d http", row("http://example.org/a.png"), bad=(URL + ", or pass --allow-urls",)),
    Fault("F24a a link out of the folder", row("out.png"), bad=(f"'out.png' {OUTSIDE}",)),
    Fault(
        "F24b a link to itself",
        row("loop.png"),
        bad=("'loop.png' cannot be opened: Too many levels of symbolic links; check",),
    ),
    Fault("F24c a FIFO", row("fifo.png"), bad=("'fifo.png' is a device, a pipe or a socket; expected an image file",)),
    Fault(
        "F24d /dev/zero",
        row("zero.png"),
        bad=("'zero.png' is a device, a pipe or a socket",),
        options={"allow_outside": True},
    ),
    Fault(
        "F25a the metadata address of a cloud",
        row("http://169.254.169.254/latest"),
        bad=(CANNOT.format(*["169.254.169.254"] * 2),),
        options={"allow_urls": True},
    ),
    Fault(
        "F25b this machine",
        row("http://127.0.0.1:1/a.png"),
        bad=(CANNOT.format(*["127.0.0.1"] * 2),),
        options={"allow_urls": True},
    ),
    Fault("F25c this machine, without the flag", row("http://127.0.0.1:1/a.png"), bad=(URL,)),
    Fault(
        "F30a bytes that are no UTF-8",
        row("a.png", "é").decode().encode("latin-1"),
        bad=("at position 31); save the file as UTF-8 (as Windows-1252, which Excel and Notepad write, it says 'é')",),
    ),
    Fault(
        "F30b NUL",
        row("a.png", "x\0y"),
        bad=("the caption holds a NUL byte; the file is damaged or no text: write it again",),
    ),
    Fault("F30c a NUL byte in the file", b"\0" + GOOD, bad=("is not valid JSON: it holds a NUL byte",)),
    Fault("F30d half a last line", GOOD[:20], bad=("is not valid JSON: Unterminated string",)),
    Fault("F30e CRLF", GOOD.replace(b"\n", b"\r\n")),
    Fault("F30f mixed types", row("a.png", 7), bad=("the caption is no text but int; write it as text",)),
    Fault(
        "F31a a row without its image",
        row("gone.png"),
        bad=("there is no file 'gone.png' (looked in ./ of the data folder)",),
    ),
    Fault("F31b a row twice", GOOD),
    Fault("F32a an empty caption", row("a.png", ""), bad=("has an empty caption; write one, or remove the row",)),
    Fault("F32b only spaces", row("a.png", " \t"), bad=("has an empty caption; write one, or remove the row",)),
    Fault(
        "F32c only control characters",
        row("a.png", "\x01\x02"),
        bad=("the caption is nothing but invisible characters; write one, or remove the row",),
    ),
    Fault("F33a special tokens", row("a.png", "<|im_end|>")),
    Fault(
        "F33b a mark of an image", row("a.png", "<|image_pad|>"), bad=("has '<|image_pad|>' in a text, and nothing",)
    ),
    Fault("F33c the same, meant so", row("a.png", "<|image_pad|>"), options={"text_as_is": True}),
    Fault("F34a right to left, emoji, accents", row("a.png", "مرحبا \u202e 👩\u200d🚀 e\u0301")),
    Fault("F34b a name that turns the line round", row("\u202egnp.a"), bad=("there is no file '\\u202egnp.a'",)),
]


@pytest.fixture
def folder(pictures, tmp_path):
    data = pictures("a.png", into="data")
    pictures("outside.png")
    (data / "out.png").symlink_to(tmp_path / "outside.png")
    (data / "loop.png").symlink_to("loop.png")
    (data / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(data / "fifo.png")
    return data


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(fault, folder):
    if fault.content is not None:
        (folder / fault.file).write_bytes(fault.content)
    (folder / "rows.jsonl").write_bytes(GOOD + (fault.lines or row(fault.file)))
    dataset = read_dataset(folder, prompt="-", **fault.options)
    found = check_dataset(dataset)
    assert len(found.bad) == len(fault.bad)
    for bad, wanted in zip(found.bad, fault.bad, strict=True):
        assert (bad.source, bad.line) == ("rows.jsonl", 2)
        assert any(part in bad.reason for part in wanted.split("|")), bad.reason
        assert "\n" not in bad.reason
    assert found.facts()["answers"] + len(found.bad) == 2
    if fault.colour:
        image = load_image(found.examples[1].images[0])
        corner = image.getpixel((image.width - 1, 0))
        assert max(abs(a - b) for a, b in zip(corner, fault.colour, strict=True)) <= 2
    assert found.facts()["several_frames"] == ("F21" in fault.name)


def test_every_number_of_the_table_is_here():
    here = {int(number) for number in re.findall(r"F(\d+)", " ".join(fault.name for fault in FAULTS))}
    here |= {int(number) for name in globals() for number in re.findall(r"_f(\d+)", name)}
    assert here == {*range(11, 28), *range(30, 37)}


def test_f15_f16_no_image_costs_more_tokens_than_the_limit_allows(folder, capsys):
    sizes = [(1, 1), (1, 201), (1, 10_000), (5000, 26)]
    for number, size in enumerate(sizes):
        Image.new("RGB", size).save(folder / f"{number}.png")
    (folder / "rows.jsonl").write_bytes(b"".join(row(f"{number}.png") for number in range(4)))
    assert main(["check", str(folder / "rows.jsonl"), "--json", "--model", "tiny", "--max-pixels", "4096"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert 1 <= facts["tokens"]["per_image"]["most"] <= 4096 // 16**2  # one token of tiny is 16x16 pixels


def test_f26_nothing_in_a_tar_is_unpickled_or_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    image, bomb = (folder / "a.png").read_bytes(), pickle.dumps(Bomb())
    members = [("0.png", image), ("0.pyd", bomb), ("0.pkl", bomb), ("0.txt", "good")]
    members += [("pipe:touch bomb-went-off.png", image), ("pipe:touch bomb-went-off.txt", "a name like any other")]
    found = check_dataset(read_dataset(write_tar(folder / "x.tar", members), prompt="-"))
    assert (found.facts()["answers"], found.bad) == (2, ())
    assert not (folder / "bomb-went-off").exists()


def test_f27_nothing_is_extracted_and_members_have_a_limit(folder):
    image = (folder / "a.png").read_bytes()
    members = [("0.png", image), ("0.txt", "good"), ("../../1.png", image), ("../../1.txt", "stays inside")]
    members += [("2.png", tarfile.LNKTYPE), ("2.txt", "x"), ("3.png", image), ("3.txt", b" " * (17 << 20))]
    before = sorted(folder.parent.rglob("*"))
    shard = write_tar(folder / "x.tar", members)
    found = check_dataset(read_dataset(shard, prompt="-"))
    assert [(bad.source, bad.line) for bad in found.bad] == [("x.tar", 3), ("x.tar", 4)]
    assert "'2.png' is a link, a device or a sparse file; expected the file itself" in found.bad[0].reason
    assert "'3.txt' has 17,825,792 bytes, the limit is 16,777,216; shrink it" in found.bad[1].reason
    assert sorted(folder.parent.rglob("*")) == sorted([*before, shard])
    with tarfile.open(folder / "x.tar.tar", "w:gz") as tar:
        tar.add(shard, "x")
    with pytest.raises(DataError, match="is not readable as an uncompressed tar"):
        read_dataset(folder / "x.tar.tar", prompt="-")


def test_f30_a_byte_order_mark_is_no_part_of_the_data(folder):
    (folder / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD)
    assert check_dataset(read_dataset(folder, prompt="-")).facts()["answers"] == 1


def test_f31_images_without_a_row_are_named(folder):
    (folder / "metadata.jsonl").write_bytes(GOOD.replace(b"image", b"file_name"))
    bad = {row.source: row.reason for row in read_dataset(folder, prompt="-").bad}
    assert set(bad) == {"out.png", "loop.png", "zero.png", "fifo.png"}
    assert set(bad.values()) == {"no row of metadata.jsonl names this image; add one, or remove it"}


def test_f32_a_caption_of_a_megabyte_is_named_before_training(folder, capsys):
    (folder / "rows.jsonl").write_bytes(GOOD + row("a.png", "word " * 200_000) + row("a.png", "short"))
    assert main(["check", str(folder / "rows.jsonl"), "--json", "--model", "tiny"]) == 1
    facts = json.loads(capsys.readouterr().out)
    (bad,) = facts["bad"]
    assert (facts["answers"], facts["examples"], bad["source"], bad["line"]) == (2, 1, "rows.jsonl", 2)
    assert re.match(r"needs \d+ tokens, \d+ of them for images and instruction; --max-tokens is 4096", bad["reason"])


def test_f33_special_tokens_in_a_caption_are_learnt_as_the_text_they_are(folder, capsys):
    (folder / "rows.jsonl").write_bytes(row("a.png", "<|image_pad|><|im_end|>"))
    assert main(["check", str(folder / "rows.jsonl"), "--json", "--model", "tiny", "--text-as-is"]) == 0
    sample = json.loads(capsys.readouterr().out)["tokens"]["sample"]
    assert [part["text"] for part in sample if part["learnt"]] == ["<|image_pad|><|im_end|><|im_end|>"]
    assert sum("<|image_pad|> x" in part["text"] for part in sample) == 1


def test_f34_names_with_a_newline_or_a_hyphen_are_read_and_escaped(folder, capsys):
    for name in ("new\nline", "-h", "snow ❄"):
        (folder / f"{name}.png").write_bytes((folder / "a.png").read_bytes())
        (folder / f"{name}.txt").write_text(name)
    (folder / "a.png").write_bytes(b"")
    (folder / "a.txt").write_text("\x1b[2J")
    assert main(["check", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "new\\nline.png" in out
    assert "\x1b" not in out


def test_f34_a_name_that_is_no_utf8_is_named_and_breaks_no_output(folder, capsysbinary):
    for name in (b"\xff.png", b"\xff.txt", b"a.txt"):
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(b"x")
    assert main(["check", str(folder), "--json"]) == 1
    named = {bad["source"]: bad["reason"] for bad in json.loads(capsysbinary.readouterr().out)["bad"]}
    assert "has a name that is not UTF-8 (as Windows-1252, which Excel" in named["\udcff.png"]
    assert main(["check", str(folder)]) == 1
    assert b"bad: \\udcff.png: " in capsysbinary.readouterr().out
    command = ["train", str(folder), "--model", "tiny", "--max-steps", "1", "--no-eval", "--val-split", "0"]
    assert main([*command, "--on-bad-row", "quarantine", "--output", str(folder.parent / "run")]) == 0
    assert b"Rows: trained 1, held out 0, quarantined 5 (" in capsysbinary.readouterr().err
    rows = (folder.parent / "run/quarantined.jsonl").read_text(encoding="utf-8").splitlines()
    assert "\udcff.png" in {json.loads(row)["source"] for row in rows}


def test_f35_captions_that_two_images_would_share_and_twins(pictures):
    folder = pictures("a.png", "a.jpg", "B.png", "b.png")
    for name in ("a", "B", "b"):
        (folder / f"{name}.txt").write_text(name)
    dataset = read_dataset(folder, prompt="-")
    reason = "'a.txt' would be for 'a.jpg', 'a.png'; rename one"
    assert {row.source: row.reason for row in dataset.bad} == {"a.jpg": reason, "a.png": reason}
    assert {example.id for example in dataset.examples} == {"B.png", "b.png"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr_rate: 1", "unknown setting 'lr_rate'"),
        ("epoch: 1", "unknown setting 'epoch'. Did you mean 'epochs'?"),
        ("rank: much", "rank is 'much'; expected int."),
        ("just words", "expected 'name: value' lines, found str."),
        ("columns: {image: x}", "columns is {'image': 'x'}; expected str."),
        ("columns: bilder=x", "--columns bilder=x: unknown 'bilder'; expected one of image, caption"),
        ("format: yolo", "--format yolo: unknown; expected one of imagefolder"),
    ],
)
def test_f36_a_typo_in_the_settings_is_wrong_usage(text, message, folder, capsys):
    (folder / "run.yaml").write_text(f"data: {folder}\nmodel: tiny\n{text}\n" if ":" in text else text)
    assert main(["train", "--config", str(folder / "run.yaml")]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match="unknown 'bilder'"):
        read_dataset(folder, prompt="-", columns={"bilder": "x"})
