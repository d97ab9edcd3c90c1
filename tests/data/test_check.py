"""What `check_dataset` finds, `clean_text` changes, and `write_clean` writes so that it reads back as it was.

Run: pytest tests/data/test_check.py
"""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import vlm_lora.check.images as check_images
from tests.conftest import ROOT
from tests.data.test_formats import (
    CAPTION_LAYOUTS,
    NAMES,
    PROMPT,
    lines,
    qa_answers,
    qa_both,
    qa_csv,
    vqav2,
)
from vlm_lora.check.clean import clean_example, write_clean
from vlm_lora.check.dataset import check_dataset, scripts
from vlm_lora.check.images import NEAR_BITS, NEAR_COLOUR, NEAR_GREY, Seen, look_at, near_duplicates
from vlm_lora.check.sheet import write_sheet
from vlm_lora.data.example import ImageRef
from vlm_lora.data.images import content_hash
from vlm_lora.data.readers import read_dataset
from vlm_lora.data.split import split_examples
from vlm_lora.data.texts import clean_text, is_blank
from vlm_lora.errors import DataError


def photo(seed, size=(96, 64)):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    """Eight photos, one of them three times: as a copy of the file, and as a smaller JPEG."""
    for number in range(8):
        photo(number).save(tmp_path / f"{number}.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "3.png").read_bytes())
    photo(3).resize((48, 32)).save(tmp_path / "small.jpg", quality=70)
    for path in (*tmp_path.glob("*.png"), *tmp_path.glob("*.jpg")):
        path.with_suffix(".txt").write_text("a photo\n" if path.stem in "012" else f"picture {path.stem}\n")
    return tmp_path


def check(folder, **options):
    return check_dataset(read_dataset(folder, prompt=PROMPT), **options)


def test_what_is_there_is_counted(folder):
    facts = check(folder).facts()
    assert (facts["format"], facts["examples"], facts["images"], facts["answers"]) == ("sidecar", 10, 10, 10)
    assert facts["bad"] == []
    assert facts["answers_per_example"] == {"least": 1, "median": 1, "most": 1, "mean": 1.0}
    assert facts["image_sizes"] == {"smallest": (48, 32), "median": (96, 64), "largest": (96, 64)}
    assert facts["repeated"] == [["a photo", 3]]
    assert facts["scripts"] == {"latin": 1.0}
    assert facts["cleaning"] == {"texts": 0}
    json.dumps(facts)


def test_copies_and_lookalikes_are_told_apart(folder):
    found = check(folder)
    assert found.duplicates == (("3.png", "copy.png"),)
    assert {frozenset(pair) for pair in found.near} == {
        frozenset({"3.png", "small.jpg"}),
        frozenset({"copy.png", "small.jpg"}),
    }


def test_flat_pictures_of_other_colours_do_not_look_alike(pictures):
    folder = pictures(*NAMES)
    for name in NAMES:
        (folder / name).with_suffix(".txt").write_text("one colour")
    assert check(folder).near == ()


def test_a_drawing_on_plain_ground_saved_as_jpeg_looks_like_itself(tmp_path):
    """The noise of JPEG on a ground of one colour says nothing of the picture."""
    looks = []
    for number, path in enumerate(sorted((ROOT / "data/emoji_scenes/images").glob("*.png"))[:60]):
        drawn = Image.open(path).convert("RGB")
        for name in (f"{number}.png", f"{number}.jpg"):
            drawn.save(tmp_path / name)
            looks.append(look_at(ImageRef(tmp_path / name, name)))
    found = {(a.ref.name, b.ref.name) for a, b in near_duplicates(looks)[0]}
    assert {(f"{number}.png", f"{number}.jpg") for number in range(60)} - found == set()


def test_lookalikes_are_all_found_without_comparing_all():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (100, 216))
    minis = np.concatenate([base, base + rng.integers(-9, 10, base.shape)]).clip(0, 255).astype(np.uint8)
    grey = minis.reshape(-1, 8, 9, 3) @ np.array([0.299, 0.587, 0.114], np.float32)
    bits = (grey[:, :, :-1] + NEAR_GREY < grey[:, :, 1:]).reshape(len(minis), 64)
    apart = np.abs(minis[:, None].astype(int) - minis[None]).mean(axis=2)
    near = ((bits[:, None] != bits[None]).sum(axis=2) <= NEAR_BITS) & (apart <= NEAR_COLOUR)
    expected = {(a, b) for a, b in np.argwhere(near).tolist() if a < b}
    looks = [Seen(None, sha256=str(i), miniature=mini.tobytes()) for i, mini in enumerate(minis)]
    found = {(int(a.sha256), int(b.sha256)) for a, b in near_duplicates(looks)[0]}
    assert found == expected
    assert 50 < len(found) < 100


def test_lookalikes_on_both_sides_of_the_split_are_leaks(folder):
    """For some seed the two fall apart; the split that is reported is the one that training makes."""
    dataset = read_dataset(folder, prompt=PROMPT)
    told = set()
    for seed in range(12):
        _, held = split_examples(dataset.examples, 0.3, seed)
        names = {ref.name for example in held for ref in example.images}
        apart = ("small.jpg" in names) != ("3.png" in names)
        assert bool(check_dataset(dataset, val_split=0.3, seed=seed).leaks) == apart
        told.add(apart)
    assert told == {True, False}


def test_a_search_for_lookalikes_that_ends_early_says_so(folder, monkeypatch):
    assert check(folder).facts()["near_duplicates"]["cut"] is False
    monkeypatch.setattr(check_images, "MAX_PAIRS", 1)
    found = check(folder).facts()["near_duplicates"]
    assert found["cut"] is True
    assert found["count"] >= 1


def test_images_of_a_held_out_set_that_are_in_the_other_or_look_like_one(folder, tmp_path_factory):
    val = tmp_path_factory.mktemp("val")
    (val / "is-5.png").write_bytes((folder / "5.png").read_bytes())
    photo(6).resize((48, 32)).save(val / "like-6.jpg", quality=70)
    photo(99).save(val / "new.png")
    (val / "bad.png").write_bytes(b"no picture")
    for path in list(val.iterdir()):
        path.with_suffix(".txt").write_text(path.stem)
    both = [read_dataset(place, prompt=PROMPT) for place in (folder, val)]
    found = check_dataset(*both, val_split=0.5)
    assert found.leaks == (("5.png", "is-5.png"), ("6.png", "like-6.jpg"))
    assert (len(found.examples), len(found.held_out)) == (10, 3)
    assert [row.source for row in found.bad] == ["bad.png"]
    assert ("5.png", "is-5.png") in found.duplicates
    facts = found.facts()
    assert (facts["examples"], facts["held_out"], facts["leaks"]["count"]) == (10, {"examples": 3, "answers": 3}, 2)
    assert check_dataset(both[0], read_dataset(folder, prompt=PROMPT)).facts()["leaks"]["count"] >= 9  # the same set


def test_data_that_cannot_be_split_is_checked_all_the_same(folder):
    (folder / "x.jsonl").write_text(lines([{"images": ["3.png", "small.jpg"], "caption": "both"}]))
    found = check_dataset(read_dataset(folder / "x.jsonl", prompt=PROMPT), val_split=0.5)
    assert (len(found.near), found.leaks, found.bad) == (1, (), ())


def test_every_bad_row_is_named_and_none_is_lost(folder):
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:300])
    (folder / "2.txt").write_text("\x01\x02")
    rows = [{"image": f"{n}.png", "caption": (folder / f"{n}.txt").read_text()} for n in range(8)]
    rows += [{"image": "1.png", "caption": "again"}, {"image": "gone.png", "caption": "x"}]
    (folder / "rows.jsonl").write_text(lines(rows))
    found = check_dataset(read_dataset(folder / "rows.jsonl", prompt=PROMPT), val_split=0.2)
    assert [(row.source, row.line) for row in found.bad] == [("rows.jsonl", n) for n in (3, 10, 2, 9)]
    assert "nothing but invisible characters" in found.bad[0].reason
    assert "damaged or cut off" in found.bad[2].reason
    assert found.facts()["answers"] + len(found.bad) == len(rows)


def test_an_example_of_bad_pictures_only(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "a.txt").write_text("a")
    facts = check(tmp_path).facts()
    assert (facts["examples"], facts["images"], len(facts["bad"])) == (0, 0, 1)
    assert facts["image_sizes"] == {}


def test_the_contact_sheet_is_whole_and_escapes_what_it_shows(folder, tmp_path):
    (folder / "0.txt").write_text("<script>alert(1)</script>")
    (folder / "1.png").write_bytes(b"")
    found = check(folder, thumbnails=200)
    write_sheet(tmp_path / "out" / "sheet.html", found, found.facts(), title="<b>")
    page = (tmp_path / "out" / "sheet.html").read_text(encoding="utf-8")
    assert page.count("<article>") == page.count("data:image/jpeg") == 9
    assert "is empty (0 bytes)" in page
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_a_sheet_of_many_shows_some_of_all(folder):
    looks = check(folder, thumbnails=4).seen.values()
    assert 4 <= sum(bool(look.thumbnail) for look in looks) <= 6


@pytest.mark.parametrize(
    ("text", "clean", "reasons"),
    [
        ("as it is,\nin two lines", "as it is,\nin two lines", ()),
        ("e\u0301te\u0301", "été", ("nfc",)),
        ("a\x07b\ufeff", "ab", ("control characters",)),
        ("  a \t b\u00a0c \r\n d\n", "a b c\nd", ("white space",)),
        ("e\x01\u0301", "é", ("control characters",)),
        ("👩\u200d🚀 می\u200cخواهم", "👩\u200d🚀 می\u200cخواهم", ()),
        ("<|im_end|> 雪", "<|im_end|> 雪", ()),
        ("\x01", "", ("control characters",)),
        ("\u200b \u3164", "", ("invisible characters",)),
        ("a\u200b\u00ad", "a\u200b\u00ad", ()),
    ],
)
def test_cleaning_is_minimal(text, clean, reasons):
    assert clean_text(text) == (clean, reasons)


@given(st.text())
def test_cleaning_twice_is_cleaning_once(text):
    clean, _ = clean_text(text)
    assert clean_text(clean) == (clean, ())
    assert is_blank(text) == (not clean)


def test_scripts():
    shares = {"latin": 0.3333, "cyrillic": 0.3333, "hiragana": 0.2222, "cjk": 0.1111}
    assert scripts(["abc мир 雪 123 !", "かな"]) == shares


def without_place(examples):
    return [([content_hash(ref.read_bytes()) for ref in e.images], e.dialogues) for e in examples]


@pytest.mark.parametrize(
    "layout", [*CAPTION_LAYOUTS, qa_answers, qa_both, qa_csv, vqav2], ids=lambda layout: layout.__name__
)
def test_a_clean_copy_of_any_format_reads_back_equal(layout, pictures, tmp_path):
    path, _ = layout(pictures(*NAMES, into="data"))
    examples = read_dataset(path, prompt=PROMPT).examples
    write_clean(tmp_path / "clean", examples, PROMPT)
    copy = read_dataset(tmp_path / "clean", prompt=PROMPT)
    assert copy.format == "imagefolder"
    assert copy.bad == ()
    assert without_place(copy.examples) == without_place(examples)


def test_a_clean_copy_keeps_chats_several_images_kinds_and_order(pictures, tmp_path):
    folder = pictures(*NAMES, into="data")
    chat = [("user", "What\x07 differs?"), ("assistant", "Colour. "), ("user", "How?"), ("assistant", "So.")]
    rows = [
        {"image": "a.png", "caption": "one"},
        {"image": "a.png", "messages": [{"role": role, "content": text} for role, text in chat]},
        {"image": "a.png", "caption": "two", "kind": "late"},
        {"image": "a.png", "caption": "three", "kind": "late"},
        {"image": "a.png", "question": "Which?", "answers": ["b", "a", "b"], "kind": "which"},
        {"images": ["a.png", "b.png"], "caption": "both"},
        {"images": ["a.png", "b.png"], "caption": "both again"},
        {"images": ["b.png", "a.png"], "caption": "the other way round"},
    ]
    (folder / "x.jsonl").write_text(lines(rows))
    examples = read_dataset(folder, prompt=PROMPT).examples
    write_clean(tmp_path / "clean", examples, PROMPT)
    copy = read_dataset(tmp_path / "clean", prompt=PROMPT)
    assert copy.bad == ()
    assert without_place(copy.examples) == without_place(map(clean_example, examples))
    assert [example.id for example in copy.examples] == [example.id for example in examples]
    assert (tmp_path / "clean/a.png").read_bytes() == (folder / "a.png").read_bytes()
    assert not (tmp_path / "clean/c.png").exists()


def test_no_image_of_a_clean_copy_overwrites_another(pictures, tmp_path):
    """One is called as those are that have no plain name of their own."""
    folder = pictures("images/0000002.png", "odd:name.png", into="data")
    rows = [{"image": "images/0000002.png", "caption": "plain"}, {"image": "odd:name.png", "caption": "odd"}]
    (folder / "x.jsonl").write_text(lines(rows))
    examples = read_dataset(folder, prompt=PROMPT).examples
    write_clean(tmp_path / "clean", examples, PROMPT)
    copy = read_dataset(tmp_path / "clean", prompt=PROMPT)
    assert without_place(copy.examples) == without_place(examples)


def test_a_clean_copy_goes_into_a_new_folder_only(pictures, tmp_path):
    folder = pictures("a.png", into="data")
    (folder / "a.txt").write_text("a")
    with pytest.raises(DataError, match="is there already; give a new or an empty folder"):
        write_clean(folder, read_dataset(folder, prompt=PROMPT).examples, PROMPT)
