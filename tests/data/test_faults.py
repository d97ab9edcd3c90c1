"""Damaged data: every row is read or set aside with file, line and reason; nothing raises, nothing is lost.

Fault numbers (F23...) are those of the project's fault table. Run: pytest tests/data/test_faults.py
"""

import io
import json
import os
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import picture
from vlm_lora.data.readers import parquet, read_dataset
from vlm_lora.errors import DataError

GOOD = '{"image": "a.png", "caption": "a fox"}'


def read(folder, **options):
    return read_dataset(folder, prompt="Describe.", **options)


def num_dialogues(dataset):
    return sum(len(example.dialogues) for example in dataset.examples)


def chat(*messages, **more):
    row = {
        "messages": [{"role": role, "content": content} for role, content in messages],
        "images": ["a.png"],
    }
    return json.dumps(row | more)


CHAT_FAULTS = [
    (chat(("user", "hm")), "has messages of user; expected user and assistant in turn, assistant last"),
    (chat(("user", "a"), ("user", "b"), ("assistant", "c")), "has messages of user, user, assistant"),
    (
        chat(("user", "<image>a"), ("assistant", "")),
        "has an empty assistant message; write one, or remove the row",
    ),
    (chat(("user", "<image><image>a"), ("assistant", "b")), r"has 2 <image> mark\(s\) but 1 image\(s\)"),
    (chat(("user", "<image>a"), ("assistant", "b"), images=[]), r"has 1 <image> mark\(s\) but 0 image\(s\)"),
    ('{"image": null, "question": "a", "answer": "b"}', "names no image under image, images or file_name"),
    ('{"caption": "b"}', "names no image under image, images or file_name"),
    (
        chat(("user", "a"), ("assistant", "b"), ("user", "<image><image>c"), ("assistant", "d")),
        r"has 2 <image> mark\(s\) but 1 image\(s\)",
    ),
    (chat(("tool", "a"), ("assistant", "b")), "has a message of the role 'tool'"),
    (chat(("user", [{"type": "video"}]), ("assistant", "b")), "has a part 'video' in a user message"),
    (json.dumps({"messages": [None], "image": "a.png"}), "has a message that is not an object"),
    (
        json.dumps({"query": "a", "response": "b", "images": ["a.png"], "history": [1]}),
        "has a history that is not",
    ),
]
ROW_FAULTS = [
    ("", None),  # a blank line is no row
    ('{"image": "a.png", "caption"', "is not valid JSON: Expecting ':'"),  # F30, in the middle
    ("[" * 100_000, "is not valid JSON: "),  # nested too deep for the parser
    ("[1, 2]", "is not an object with named fields but list"),
    ('{"image": "a.png"}', "has 'image'; expected messages, conversations, a question or a caption"),
    ('{"image": "a.png", "caption": "x\\u0000y"}', "the caption holds a NUL byte"),
    ('{"image": "a.png", "caption": "x\0y"}', "is not valid JSON: it holds a NUL byte"),  # F30
    ('{"image": "a.png", "caption": "\\ud800"}', "the caption is not valid UTF-8"),
    ('{"image": "a.png", "caption": ""}', "has an empty caption; write one, or remove the row"),  # F32
    ('{"image": "a.png", "caption": " \\n\\t "}', "has an empty caption"),
    *(
        (json.dumps({"image": "a.png", "caption": text}), "the caption is nothing but invisible characters; write one")
        for text in ("\u200b", "\u2060 \n", "\u00ad", "\u3164", "\x01", "\ufeff\ufe0f", "\u2800", "\U000e0041")
    ),
    ('{"image": "a.png", "caption": null}', "has an empty caption"),
    ('{"image": "a.png", "caption": []}', "has an empty list of captions"),
    ('{"image": "a.png", "caption": 7}', "the caption is no text but int"),
    ('{"image": "a.png", "question": "why?"}', "has an empty answer"),
    ('{"image": "a.png", "question": "why?", "answers": []}', "has an empty answer"),
    ('{"image": "a.png", "question": "why?", "answer": true}', "the answer is no text but bool"),
    ('{"image": "a.png", "question": " ", "answer": "x"}', "has an empty question"),
    (
        '{"image": ["a.png", "b.png"], "text": ["x", "y"]}',
        "has 2 captions, 2 images; expected a row for each",
    ),
    ('{"image": "gone.png", "caption": "x"}', r"there is no file 'gone.png' \(looked in \./"),  # F31
    ('{"image": "", "caption": "x"}', "expected the file name of an image, found ''"),
    ('{"image": 5, "caption": "x"}', "expected the file name of an image, found 5"),
    ('{"image": ["a.png", null], "caption": "x"}', "expected the file name of an image, found None"),
    ('{"image": "a\\u0000.png", "caption": "x"}', "there is no file|cannot be opened"),
    ('{"image": "' + "x" * 5000 + '.png", "caption": "x"}', "there is no file|cannot be opened"),
    (
        '{"image": "../outside.png", "caption": "x"}',
        "'../outside.png' lies outside of the data folder; move",
    ),  # F23
    ('{"image": "OUTSIDE", "caption": "x"}', "outside.png' lies outside of the data folder"),
    ('{"image": "file://OUTSIDE", "caption": "x"}', "outside.png' lies outside of the data folder"),
    (
        '{"image": "http://169.254.169.254/a.png", "caption": "x"}',
        "is a URL, which is not fetched; download",
    ),  # F25
    ('{"image": "data:image/png;base64,AAAA", "caption": "x"}', "is a URL, which is not fetched"),
    ('{"image": "link-out.png", "caption": "x"}', "'link-out.png' lies outside of the data folder"),  # F24
    (
        '{"image": "loop.png", "caption": "x"}',
        "'loop.png' cannot be opened: Too many levels of symbolic links",
    ),
    ('{"image": "dangling.png", "caption": "x"}', "'dangling.png' cannot be opened: No such file"),
    (
        '{"image": "fifo.png", "caption": "x"}',
        "'fifo.png' is a device, a pipe or a socket; expected an image",
    ),
    ('{"image": "/dev/zero", "caption": "x"}', "lies outside of the data folder"),
    ('{"image": "sub", "caption": "x"}', "'sub' is a folder; expected an image file"),
    ('{"image": "right-to-left\\u202e.png", "caption": "x"}', r"'right-to-left\\u202e.png'"),  # F34: escaped
    *CHAT_FAULTS,
]


@pytest.fixture
def folder(pictures, tmp_path):
    data = pictures("a.png", "b.png", "sub/c.png", into="data")
    pictures("outside.png")
    (data / "link-out.png").symlink_to(tmp_path / "outside.png")
    (data / "link-in.png").symlink_to(data / "sub" / "c.png")
    (data / "loop.png").symlink_to("loop.png")
    (data / "dangling.png").symlink_to("nowhere.png")
    os.mkfifo(data / "fifo.png")
    return data


@pytest.mark.parametrize(("row", "reason"), ROW_FAULTS, ids=range(len(ROW_FAULTS)))
def test_a_bad_row_is_set_aside_with_its_line(row, reason, folder):
    row = row.replace("OUTSIDE", str(folder.parent / "outside.png"))
    (folder / "x.jsonl").write_text(f"{GOOD}\n{row}\n{GOOD}\n")
    dataset = read(folder)
    assert num_dialogues(dataset) == 2
    if reason is None:
        assert dataset.bad == ()
        return
    (bad,) = dataset.bad
    assert (bad.source, bad.line) == ("x.jsonl", 2)
    assert re.search(reason, bad.reason), bad.reason
    assert "\n" not in bad.reason


def test_f23_f24_outside_is_read_when_allowed(folder):
    names = ["../outside.png", "link-out.png", str(folder.parent / "outside.png"), "link-in.png"]
    (folder / "x.jsonl").write_text("".join(json.dumps({"image": n, "caption": n}) + "\n" for n in names))
    dataset = read(folder, allow_outside=True)
    assert dataset.bad == ()
    assert [len(example.dialogues) for example in dataset.examples] == [3, 1]
    assert [bad.line for bad in read(folder).bad] == [1, 2, 3]


def test_f23_f24_a_folder_of_a_longer_name_and_a_linked_folder_are_outside(folder, pictures):
    pictures("a.png", into="data-2")
    (folder / "linked").symlink_to(folder.parent / "data-2")
    rows = [{"image": name, "caption": "x"} for name in ("../data-2/a.png", "linked/a.png", "a.png")]
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = read(folder / "x.jsonl")
    assert [(bad.line, "lies outside of the data folder" in bad.reason) for bad in dataset.bad] == [
        (1, True),
        (2, True),
    ]


OF_WINDOWS = " (as Windows-1252, which Excel and Notepad write, it says 'M\u00fcnchen')"


def test_f30_bytes_of_a_jsonl_file(folder):
    lines = [
        b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n",
        '{"image": "a.png", "caption": "M\u00fcnchen"}\n'.encode("latin-1"),
        GOOD.encode() + b"\r\n",
        GOOD.encode()[:20],
    ]
    (folder / "x.jsonl").write_bytes(b"".join(lines))
    dataset = read(folder)
    assert num_dialogues(dataset) == 2
    assert [bad.line for bad in dataset.bad] == [2, 4]
    assert dataset.bad[0].reason == f"is not UTF-8 (byte 0xfc at position 32); save the file as UTF-8{OF_WINDOWS}"
    assert dataset.bad[1].reason.endswith("it is the last line: was the file cut off?")


def test_f30_a_json_list_is_read_up_to_the_damage(folder):
    rows = ",\n".join([GOOD, '{"image": "a.png", "caption": ""}', GOOD, GOOD])
    (folder / "x.json").write_text(f"[\n{rows}"[:-10])
    dataset = read(folder)
    assert num_dialogues(dataset) == 2
    assert [bad.line for bad in dataset.bad] == [3, 5]
    assert "nothing from here on is read" in dataset.bad[1].reason


def test_f30_one_row_of_another_encoding_in_a_json_list(folder):
    rows = ",\n".join([GOOD, '{"image": "a.png", "caption": "M\u00fcnchen"}', GOOD])
    (folder / "x.json").write_bytes(f"[{rows}]".encode("latin-1"))
    dataset = read(folder)
    assert num_dialogues(dataset) == 2
    assert [(bad.line, bad.reason) for bad in dataset.bad] == [
        (2, f"the caption is not valid UTF-8; save the file as UTF-8{OF_WINDOWS}")
    ]


def test_f30_lines_of_a_csv_file(folder):
    text = (
        b"image,caption\n"
        b'a.png,"two\nlines"\n'
        b"a.png\n"
        b"a.png,M\xfcnchen\n"
        b"gone.png,x\n"
        b'a.png,"x"y\n'
        b"a.png,\n"
        b"\n"
        b"a.png,ok\n"
        b'a.png,"never closed\n'
        b"a.png,no more lost\n"
        b'a.png,"two lines\n'
        b'and","a third cell"\n'
    )
    (folder / "x.csv").write_bytes(text)
    dataset = read(folder)
    assert [d.turns[0].assistant for d in dataset.examples[0].dialogues] == ["two\nlines", "ok", "no more lost"]
    found = {bad.line: bad.reason for bad in dataset.bad}
    assert list(found) == [4, 5, 6, 7, 8, 11, 13, 14]
    assert found[4] == "has 1 cell(s), the header has 2"
    assert found[5] == f"the caption is not valid UTF-8; save the file as UTF-8{OF_WINDOWS}"
    assert found[7].startswith("is not valid CSV")
    assert found[8].startswith("has an empty caption")
    assert found[11].endswith("; is a quote not closed, or one inside the text not doubled?")


def test_a_stray_quote_takes_no_row_with_it(folder):
    rows = ['"open', "lost1", "lost2", '"quoted, one"', "ok"]
    (folder / "x.csv").write_text("image,caption\n" + "".join(f"a.png,{row}\n" for row in rows))
    dataset = read(folder)
    assert [d.turns[0].assistant for d in dataset.examples[0].dialogues] == ["lost1", "lost2", "quoted, one", "ok"]
    assert [(bad.source, bad.line) for bad in dataset.bad] == [("x.csv", 2)]


def test_rows_that_share_a_line_are_told_by_their_number(folder):
    rows = [{"image": "a.png", "caption": text} for text in ("good", "", "good", None)]
    for text in (json.dumps(rows), json.dumps({"data": [*rows]}), json.dumps(rows)[:-1]):
        (folder / "x.json").write_text(text)
        dataset = read(folder)
        assert [(bad.source, bad.line) for bad in dataset.bad[:2]] == [("x.json:row 2", None), ("x.json:row 4", None)]
    (folder / "x.json").write_text(json.dumps(rows, indent=1))
    assert [(bad.source, bad.line) for bad in read(folder).bad] == [("x.json", 6), ("x.json", 14)]


def test_f31_an_imagefolder_names_the_images_that_it_does_not_cover(pictures):
    folder = pictures("a.png", "b.png", "deep/er/c.png")
    (folder / ".hidden.png").touch()
    (folder / "metadata.csv").write_text("file_name,text\na.png,a fox\nb.png,\ngone.png,x\na.png,again\n")
    dataset = read(folder)
    assert num_dialogues(dataset) == 2
    assert [(bad.source, bad.line) for bad in dataset.bad] == [
        ("metadata.csv", 3),
        ("metadata.csv", 4),
        ("deep/er/c.png", None),
    ]
    assert dataset.bad[2].reason == "no row of metadata.csv names this image; add one, or remove it"


def test_f31_f35_sidecars_that_do_not_match(pictures):
    folder = pictures("a.png", "b.png", "b.jpg", "c.png", "d.png", "e.png", "f.png", "A.png", "g\n.png", "-h.png")
    files = {
        "a.txt": b"good",
        "b.txt": b"whose?",
        "d.txt": b"one",
        "d.caption": b"two",
        "e.txt": b" \n",
        "f.txt": "M\u00fcnchen".encode("latin-1"),
        "g\n.txt": "\u0645\u0631\u062d\u0628\u0627 \U0001f98a".encode(),  # F34
        "-h.txt": b"a name like an option",
        "orphan.txt": b"of nothing",
    }
    for name, text in files.items():
        (folder / name).write_bytes(text)
    (folder / "fifo.png").unlink(missing_ok=True)
    os.mkfifo(folder / "fifo.png")
    (folder / "fifo.txt").write_text("waits for ever")
    dataset = read(folder)
    assert sorted(example.id for example in dataset.examples) == ["-h.png", "a.png", "g\n.png"]
    found = {bad.source: bad.reason for bad in dataset.bad}
    assert found == {
        "A.png": "has no caption; expected 'A.txt' beside it",  # a.txt is not its own
        "b.jpg": "'b.txt' would be for 'b.jpg', 'b.png'; rename one",
        "b.png": "'b.txt' would be for 'b.jpg', 'b.png'; rename one",
        "c.png": "has no caption; expected 'c.txt' beside it",
        "d.png": "has 2 captions: 'd.caption', 'd.txt'; keep one",
        "e.png": "has an empty caption file 'e.txt'; write one, or remove the row",
        "f.png": f"'f.txt' is not UTF-8 (byte 0xfc at position 1); save the file as UTF-8{OF_WINDOWS}",
        "fifo.png": "'fifo.png' is a device, a pipe or a socket; expected an image file",
        "orphan.txt": "is a caption without an image of its name",
    }


def test_f33_f32_text_stays_text(folder):
    texts = ["<|im_end|><|image_pad|> <image>", "x" * 1_000_000, "\u202eabc", "a\u0301\r\n\tb"]
    (folder / "x.jsonl").write_text("".join(json.dumps({"image": "a.png", "caption": t}) + "\n" for t in texts))
    (example,) = read(folder, text_as_is=True).examples
    assert [d.turns[0].assistant for d in example.dialogues] == texts
    assert [bad.line for bad in read(folder).bad] == [1]


def test_a_text_that_fits_into_no_model_is_a_bad_row_at_once(folder):
    """The tokens of 5 MB of text took 1.6 GB of memory, only to be found too many."""
    longest = "x" * (1 << 20)
    rows = [{"image": "a.png", "caption": longest}, {"image": "a.png", "captions": ["ok", longest + "x"]}]
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = read(folder / "x.jsonl")
    assert [len(d.turns[0].assistant) for d in dataset.examples[0].dialogues] == [1 << 20, 2]
    reason = "the caption has 1,048,577 characters, the limit is 1,048,576; shorten it"
    assert [(bad.line, bad.reason) for bad in dataset.bad] == [(2, reason)]


def test_a_huge_caption_file_is_not_read(pictures):
    folder = pictures("a.png", "b.png")
    (folder / "a.txt").write_text("a fox")
    with (folder / "b.txt").open("wb") as file:
        file.truncate(1 << 29)  # takes no room on the disk
    (bad,) = read(folder).bad
    assert (bad.source, bad.reason) == (
        "b.png",
        "'b.txt' has 536,870,912 bytes, the limit is 16,777,216; shorten it",
    )


def test_one_bad_caption_of_several_leaves_the_others(folder):
    (folder / "x.jsonl").write_text('{"image": "a.png", "captions": ["one", "", "three"]}\n')
    dataset = read(folder)
    assert num_dialogues(dataset) == 2
    assert [bad.line for bad in dataset.bad] == [1]


def test_coco_and_vqa_rows_without_their_other_half(folder):
    data = {
        "images": [
            {"id": 1, "file_name": "a.png"},
            {"id": 2, "file_name": "gone.png"},
            {"id": 3, "file_name": "b.png"},
        ],
        "annotations": [
            {"id": 10, "image_id": 1, "caption": "a fox"},
            {"id": 11, "image_id": 1, "caption": ""},
            {"id": 12, "image_id": 2, "caption": "gone"},
            {"id": 13, "image_id": 99, "caption": "whose?"},
            None,
        ],
    }
    data["images"] += [{"id": 1, "file_name": "b.png"}, {"id": 4}]
    (folder / "captions.json").write_text(json.dumps(data))
    dataset = read(folder)
    assert num_dialogues(dataset) == 1
    assert dataset.examples[0].place == "captions.json:annotation 1 (id 10)"
    reasons = "\n".join(bad.reason for bad in dataset.bad)
    for part in (
        "annotation 2 (id 11): has an empty caption",
        "annotation 3 (id 12): there is no file 'gone.png'",
        "annotation 4 (id 13): is about the image 99, which is not in the list of images",
        "annotation 5: is no object",
        "image 'b.png' (id 3) has no caption",
        "image 4 of the list has an id taken before",
        "image 5 of the list has no id or no file_name",
    ):
        assert part in reasons
    assert len(dataset.bad) == 7

    (folder / "captions.json").unlink()
    questions = [{"question_id": i, "image_id": "a", "question": "q?"} for i in (1, 2)]
    answers = [{"question_id": i, "multiple_choice_answer": "yes"} for i in (1, 3)]
    (folder / "my_questions.json").write_text(json.dumps({"questions": questions}))
    (folder / "my_annotations.json").write_text(json.dumps({"annotations": answers}))
    dataset = read(folder)
    assert num_dialogues(dataset) == 1
    assert dataset.examples[0].dialogues[0].accepted == ()
    assert [bad.reason for bad in dataset.bad] == [
        "question 2 (id 2): has no annotation; test sets have none, use train or val",
        "the annotation of question 3 has no question",
    ]


def test_a_cell_of_a_parquet_file_that_is_gone(folder):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [{"image": {"bytes": (folder / n).read_bytes(), "path": n}, "text": n} for n in ("a.png", "b.png")]
    rows += [{"image": {"bytes": None, "path": "../outside.png"}, "text": "x"}, {"image": None, "text": "x"}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "x.parquet")
    dataset = read(folder / "x.parquet")
    assert num_dialogues(dataset) == 2
    assert [(bad.line, bad.reason[:30]) for bad in dataset.bad] == [
        (3, "'../outside.png' lies outside "),
        (4, "names no image under image, im"),
    ]
    assert dataset.examples[1].images[0].read_bytes() == (folder / "b.png").read_bytes()
    (folder / "x.parquet").write_bytes(b"PAR1 no more")
    parquet._column.cache_clear()
    with pytest.raises(DataError, match=r"x.parquet, row group 0: cannot be read"):
        dataset.examples[0].images[0].read_bytes()


# A line is good, or any bytes, or nearly good: a value of any type under a key that means something
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 9)
    | st.floats()
    | st.sampled_from(["a.png", "<image>", "", "user", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "type", "text", "image", "url", "answer", "path"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
KEYS = ["image", "images", "caption", "text", "messages", "conversations", "query", "response", "question"]
KEYS += ["answer", "answers", "history", "system", "kind", "multiple_choice_answer"]
NEARLY = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4).map(lambda row: json.dumps(row).encode())
LINES = st.lists(NEARLY | st.binary(max_size=30) | st.just(GOOD.encode()), max_size=8)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=LINES)
def test_any_lines_raise_nothing_but_ours_and_every_row_is_accounted_for(lines, pictures):
    folder = pictures("a.png")
    data = b"\n".join([GOOD.encode(), *lines, GOOD.encode()]) + b"\n"
    (folder / "x.jsonl").write_bytes(data)
    dataset = read(folder / "x.jsonl")
    rows = [number for number, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    named = [example.line for example in dataset.examples]
    assert all(bad.line in rows and bad.reason for bad in dataset.bad)
    assert set(named) <= set(rows)
    # A list of captions is several rows in one line: each is a dialogue or a BadRow
    extra = sum(_num_captions(line) - 1 for line in data.split(b"\n") if line.strip())
    several = {bad.line for bad in dataset.bad}
    assert len(rows) <= num_dialogues(dataset) + len(dataset.bad) <= len(rows) + extra
    assert len(several) + num_dialogues(dataset) >= len(rows) - extra


def _num_captions(line):
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return 1
    values = [row.get(key) for key in ("caption", "text")] if isinstance(row, dict) else []
    return max([1, *(len(value) for value in values if isinstance(value, list))])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=80) | NEARLY | st.lists(NEARLY).map(b",".join).map(lambda rows: b"[" + rows + b"]"))
@pytest.mark.parametrize("name", ["x.json", "x.csv", "x.jsonl", "metadata.csv", "a.txt", "x.parquet"])
def test_any_file_raises_nothing_but_ours(name, data, pictures):
    folder = pictures("a.png")
    (folder / name).write_bytes(data)
    try:
        dataset = read(folder)
    except DataError:
        return
    assert num_dialogues(dataset) + len(dataset.bad) > 0
    dataset.fingerprint()


def test_a_damaged_row_group_takes_no_other_with_it(folder):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [{"image": "a.png", "caption": f"caption {i} " * 9} for i in range(9)]
    file = folder / "x.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=3, compression="gzip", use_dictionary=False)
    data = bytearray(file.read_bytes())
    column = pq.ParquetFile(file).metadata.row_group(1).column(1)
    data[column.data_page_offset : column.data_page_offset + 40] = b"\xff" * 40
    file.write_bytes(data)
    dataset = read(file)
    assert [bad.line for bad in dataset.bad] == [4, 5, 6]
    assert num_dialogues(dataset) == 6


def test_images_of_a_large_row_group_are_decoded_by_the_batch(folder, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    monkeypatch.setattr(parquet, "AT_ONCE", 4000)
    images = [bytes([i]) * 1000 for i in range(60)]
    pq.write_table(pa.table({"image": images, "caption": ["x"] * 60}), folder / "x.parquet", use_dictionary=False)
    refs = [example.images[0] for example in read(folder / "x.parquet").examples]
    assert len({(ref.embedded.row_group) for ref in refs}) == 1
    for order in (range(60), range(59, -1, -7), (3, 40, 3)):
        assert [refs[i].read_bytes() for i in order] == [images[i] for i in order]
    column = parquet._column(folder.resolve() / "x.parquet", 0, "image")
    assert sum(len(values) for _, values in column.kept) < 50


def test_a_file_with_a_colon_in_its_name_is_no_url(pictures):
    folder = pictures("scan:1.png")
    (folder / "x.csv").write_text("image,caption\nscan:1.png,x\nscan:2.png,x\ns3://bucket/a.png,x\n")
    dataset = read(folder)
    assert [example.id for example in dataset.examples] == ["scan:1.png"]
    assert [bad.line for bad in dataset.bad] == [3, 4]
    assert all("is a URL, which is not fetched" in bad.reason for bad in dataset.bad)


@pytest.mark.parametrize("zero", [0, 0.0, "0"])
@pytest.mark.parametrize("field", ["answer", "answers", "response", "multiple_choice_answer"])
def test_a_count_of_zero_is_an_answer(tmp_path, field, zero):
    picture(0).save(tmp_path / "a.png")
    asked = {"image": "a.png", "question": "How many?"}
    rows = [asked | {field: zero}, asked | {field: [zero, zero, 2]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = read(tmp_path)
    answers = [d.turns[-1].assistant for e in dataset.examples for d in e.dialogues]
    assert (answers, dataset.bad) == ([str(zero)] * 2, ())


def test_zero_is_learnt_where_people_disagree(tmp_path):
    picture(0).save(tmp_path / "a.png")
    asked = {"image": "a.png", "question": "How many?", "answers": [0, 1, 1]}
    rows = [asked | {"answer": 0}, asked | {"multiple_choice_answer": 0}, asked]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = read(tmp_path)
    answers = [d.turns[-1].assistant for e in dataset.examples for d in e.dialogues]
    assert (answers, dataset.bad) == (["0", "0", "1"], ())


def test_another_picture_under_the_same_name_is_other_data(tmp_path):
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("A picture.")
    before = read(tmp_path).fingerprint()
    assert read(tmp_path).fingerprint() == before
    picture(0, (80, 64)).save(tmp_path / "a.png")
    assert read(tmp_path).fingerprint() != before


def test_what_is_said_beside_a_text_makes_it_other_data(tmp_path):
    """A system prompt, the place of an image, the weight of an answer: each alone changes the fingerprint."""
    picture(0).save(tmp_path / "a.png")
    turns = [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "A"}]
    placed = [turns[0] | {"content": "Q<image>"}, turns[1]]
    rows = [
        {"messages": turns},
        {"messages": turns, "system": "Be brief."},
        {"messages": placed},
        {"messages": turns, "weight": 2},
        {"messages": [*turns, turns[0] | {"content": "R"}, turns[1]]},
        {"messages": [turns[0], turns[1] | {"loss": False}, turns[0] | {"content": "R"}, turns[1]]},
    ]
    prints = set()
    for row in rows:
        (tmp_path / "rows.jsonl").write_text(json.dumps(row | {"images": ["a.png"]}) + "\n")
        dataset = read(tmp_path)
        assert dataset.bad == ()
        prints.add(dataset.fingerprint())
    assert len(prints) == len(rows)


def test_another_picture_of_the_same_size_in_a_table_is_other_data(tmp_path):
    """Of what is no file of its own the hash counts."""
    prints = set()
    for pixel in range(3):
        image = io.BytesIO()
        Image.new("RGB", (8, 8), (pixel, 0, 0)).save(image, "BMP")  # all as long
        rows = [{"image": {"bytes": image.getvalue(), "path": "a.bmp"}, "text": "A picture."}]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
        prints.add(read(tmp_path / "data.parquet").fingerprint())
    assert len(prints) == 3
