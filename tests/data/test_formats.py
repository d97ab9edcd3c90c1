"""Each format, from files laid out as people have them: the same content gives the same Examples.

Run: pytest tests/data/test_formats.py
"""

import csv
import io
import json
from pathlib import Path

import pytest

from vlm_lora.cli import main
from vlm_lora.data.example import Dialogue, Turn
from vlm_lora.data.images import content_hash
from vlm_lora.data.readers import FORMATS, read_dataset
from vlm_lora.errors import ConfigError, DataError

PROMPT = "Describe this image."
NAMES = ("a.png", "b.png", "c.png")
# Rows in the order of the data: two captions of a, with another image between them
CAPTIONS = [
    ("a.png", "a red fox"),
    ("b.png", "зима, 雪 ❄"),
    ("a.png", "an animal <|im_end|>"),
    ("c.png", 'say "x, y"'),
]
QUESTIONS = [
    ("a.png", "Is it day?", ["yes", "no", "yes"], "is it"),
    ("b.png", "How many?", ["2", "two", "2"], "how many"),
    ("a.png", "What colour?", ["red", "red", "brown"], "what"),
    ("c.png", "Where?", ["here", "there", "here"], "where"),
]


def by_image(rows):
    """The expected Examples: [(image name, its dialogues)] in order of first appearance."""
    found = {}
    for name, dialogue in rows:
        found.setdefault(name, []).append(dialogue)
    return list(found.items())


def plain(dataset, folder):
    """Examples without ids and sources: [(image name, dialogues)], the image known by its bytes."""
    names = {content_hash(path.read_bytes()): path.name for path in folder.rglob("*.png")}
    return [
        (names[content_hash(example.images[0].read_bytes())], list(example.dialogues)) for example in dataset.examples
    ]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(rows, delimiter=","):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def parquet(path: Path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)


def embedded(folder, name):
    return {"bytes": (folder / name).read_bytes(), "path": name}


def rows_of(name_key, text_key):
    return [{name_key: name, text_key: text} for name, text in CAPTIONS]


# Each writes the captions into `folder`, which holds the pictures, and returns what to read and its format.


def imagefolder_jsonl(folder):
    (folder / "metadata.jsonl").write_text(lines(rows_of("file_name", "text")), encoding="utf-8")
    return folder, "imagefolder"


def imagefolder_jsonl_lists(folder):
    found = by_image(CAPTIONS)
    (folder / "metadata.jsonl").write_text(lines({"file_name": n, "captions": c} for n, c in found), encoding="utf-8")
    return folder, "imagefolder"


def imagefolder_csv(folder):
    (folder / "metadata.csv").write_text(table(rows_of("file_name", "caption")), encoding="utf-8-sig")
    return folder, "imagefolder"


def imagefolder_parquet(folder):
    parquet(folder / "metadata.parquet", rows_of("file_name", "text"))
    return folder, "imagefolder"


def captions_jsonl(folder):
    (folder / "train.jsonl").write_text(lines(rows_of("image", "caption")), encoding="utf-8")
    (folder / "test.jsonl").write_text("not read\n")
    return folder, "captions"


def captions_json(folder):
    (folder / "all.json").write_text(json.dumps(rows_of("image", "text"), indent=2))
    return folder / "all.json", "captions"


def captions_jsonl_named_json(folder):
    (folder / "all.json").write_text(lines(rows_of("image", "text")), encoding="utf-8")
    return folder, "captions"


def captions_under_data(folder):
    (folder / "all.json").write_text(json.dumps({"version": 1, "data": rows_of("image", "text")}))
    return folder, "captions"


def captions_csv(folder):
    (folder / "all.csv").write_text(table(rows_of("image", "caption"), ";"), encoding="utf-8")
    return folder, "csv"


def captions_tsv(folder):
    (folder / "all.tsv").write_text(table(rows_of("filepath", "caption"), "\t"), encoding="utf-8")
    return folder / "all.tsv", "tsv"


def captions_parquet(folder):
    parquet(folder / "all.parquet", [{"image": embedded(folder, n), "text": t} for n, t in CAPTIONS])
    return folder, "parquet"


def captions_parquet_shards(folder):
    rows = [{"image": embedded(folder, n)["bytes"], "text": t} for n, t in CAPTIONS]
    (folder / "data").mkdir()
    parquet(folder / "data" / "train-00000-of-00002.parquet", rows[:2])
    parquet(folder / "data" / "train-00001-of-00002.parquet", rows[2:])
    parquet(folder / "data" / "test-00000-of-00001.parquet", rows)
    return folder, "parquet"


def coco(folder):
    ids = {name: number for number, name in enumerate(NAMES, start=9)}
    data = {
        "info": {"year": 2017},
        "images": [{"id": i, "file_name": n, "height": 6, "width": 8} for n, i in ids.items()],
        "annotations": [{"id": k, "image_id": ids[n], "caption": t} for k, (n, t) in enumerate(CAPTIONS)],
    }
    (folder / "annotations").mkdir()
    (folder / "train2017").mkdir()
    for name in NAMES:
        (folder / name).rename(folder / "train2017" / name)
    (folder / "annotations" / "captions_train2017.json").write_text(json.dumps(data))
    (folder / "annotations" / "captions_val2017.json").write_text("{}")
    (folder / "annotations" / "instances_train2017.json").write_text("{}")
    return folder, "coco"


def coco_file(folder):
    coco(folder)
    return folder / "annotations" / "captions_train2017.json", "coco"


def messages_trl(folder):
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]},
                {"role": "assistant", "content": [{"type": "text", "text": text}]},
            ],
            "images": [name],
        }
        for name, text in CAPTIONS
    ]
    (folder / "train.jsonl").write_text(lines(rows), encoding="utf-8")
    return folder, "messages"


def messages_inside(folder):
    rows = [
        {
            "messages": [
                {"role": "system", "content": "You are a helpful assistant."},
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": (folder / name).as_uri()},
                        {"type": "text", "text": PROMPT},
                    ],
                },
                {"role": "assistant", "content": text},
            ]
        }
        for name, text in CAPTIONS
    ]
    (folder / "chat.json").write_text(json.dumps(rows))
    return folder / "chat.json", "messages"


def messages_swift(folder):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"<image>{PROMPT}"},
                {"role": "assistant", "content": text},
            ],
            "images": [name],
        }
        for name, text in CAPTIONS
    ]
    (folder / "swift.jsonl").write_text(lines(rows), encoding="utf-8")
    return folder / "swift.jsonl", "messages"


def messages_parquet(folder):
    rows = [
        {
            "messages": [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": text}],
            "images": [embedded(folder, name)],
        }
        for name, text in CAPTIONS
    ]
    parquet(folder / "chat.parquet", rows)
    return folder / "chat.parquet", "parquet"


def llava(folder):
    rows = [
        {
            "id": str(number),
            "image": name,
            "conversations": [
                {"from": "human", "value": f"<image>\n{PROMPT}" if number % 2 else f"{PROMPT}\n<image>"},
                {"from": "gpt", "value": text},
            ],
        }
        for number, (name, text) in enumerate(CAPTIONS)
    ]
    (folder / "images").mkdir()
    for name in NAMES:
        (folder / name).rename(folder / "images" / name)
    (folder / "llava_instruct.json").write_text(json.dumps(rows, indent=1))
    return folder, "conversations"


def query_response(folder):
    rows = [{"query": f"<image>{PROMPT}", "response": text, "images": [name]} for name, text in CAPTIONS]
    (folder / "train.jsonl").write_text(lines(rows), encoding="utf-8")
    return folder, "query-response"


def prompt_as_question(folder):
    rows = [{"image": name, "question": PROMPT, "answer": text} for name, text in CAPTIONS]
    (folder / "train.jsonl").write_text(lines(rows), encoding="utf-8")
    return folder, "qa"


CAPTION_LAYOUTS = [
    imagefolder_jsonl,
    imagefolder_jsonl_lists,
    imagefolder_csv,
    imagefolder_parquet,
    captions_jsonl,
    captions_json,
    captions_jsonl_named_json,
    captions_under_data,
    captions_csv,
    captions_tsv,
    captions_parquet,
    captions_parquet_shards,
    coco,
    coco_file,
    messages_trl,
    messages_inside,
    messages_swift,
    messages_parquet,
    llava,
    query_response,
    prompt_as_question,
]


@pytest.mark.parametrize("layout", CAPTION_LAYOUTS, ids=lambda layout: layout.__name__)
def test_the_same_captions_through_every_format(layout, pictures):
    folder = pictures(*NAMES)
    path, format = layout(folder)
    dataset = read_dataset(path, prompt=PROMPT)
    assert dataset.format == format
    assert dataset.bad == ()
    system = "You are a helpful assistant." if layout is messages_inside else ""
    expected = by_image([(name, Dialogue((Turn(PROMPT, text),), system=system)) for name, text in CAPTIONS])
    assert plain(dataset, folder) == expected
    assert len({example.id for example in dataset.examples}) == 3
    if format not in ("parquet", "tsv"):  # the override gives what looking gives
        assert read_dataset(path, prompt=PROMPT, format=format) == dataset


def qa_answers(folder):
    rows = [{"image": n, "question": q, "answers": a, "question_type": k} for n, q, a, k in QUESTIONS]
    (folder / "train.jsonl").write_text(lines(rows))
    return folder, "qa"


def qa_both(folder):
    """The way of Hugging Face's VQAv2: ten answers as objects, and the one to learn."""
    rows = [
        {
            "image": embedded(folder, n),
            "question": q,
            "multiple_choice_answer": a[0],
            "answers": [{"answer": x, "answer_confidence": "yes", "answer_id": i} for i, x in enumerate(a)],
            "question_type": k,
        }
        for n, q, a, k in QUESTIONS
    ]
    parquet(folder / "validation.parquet", rows)
    return folder, "parquet"


def qa_csv(folder):
    rows = [{"image": n, "question": q, "answers": json.dumps(a), "qtype": k} for n, q, a, k in QUESTIONS]
    (folder / "train.csv").write_text(table(rows))
    return folder, "csv"


def vqav2(folder):
    ids = {name: number for number, name in enumerate(NAMES, start=25)}
    (folder / "val2014").mkdir()
    for name, number in ids.items():
        image = folder / "val2014" / f"COCO_val2014_{number:012d}.jpg"
        image.write_bytes((folder / name).read_bytes())  # a PNG named .jpg: the content decides
    questions = [{"image_id": ids[n], "question": q, "question_id": 7 + i} for i, (n, q, _, _) in enumerate(QUESTIONS)]
    annotations = [
        {
            "question_type": k,
            "multiple_choice_answer": a[0],
            "answers": [{"answer": x, "answer_confidence": "yes", "answer_id": j} for j, x in enumerate(a)],
            "image_id": ids[n],
            "answer_type": "other",
            "question_id": 7 + i,
        }
        for i, (n, _, a, k) in enumerate(QUESTIONS)
    ]
    head = {"data_type": "mscoco", "data_subtype": "val2014"}
    (folder / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(
        json.dumps(head | {"task_type": "Open-Ended", "questions": questions})
    )
    (folder / "v2_mscoco_val2014_annotations.json").write_text(json.dumps(head | {"annotations": annotations}))
    return folder, "vqav2"


def vqav2_by_its_questions(folder):
    vqav2(folder)
    return folder / "v2_OpenEnded_mscoco_val2014_questions.json", "vqav2"


def vqav2_by_its_annotations(folder):
    vqav2(folder)
    return folder / "v2_mscoco_val2014_annotations.json", "vqav2"


def test_captions_beside_vqav2_are_no_part_of_it(pictures):
    folder = pictures(*NAMES)
    path, format = vqav2(folder)
    wanted = read_dataset(path, prompt=PROMPT)
    (folder / "captions_val2014.json").write_text('{"images": [], "annotations": []}')
    dataset = read_dataset(path, prompt=PROMPT, format=format)
    assert (dataset.format, dataset.examples, dataset.bad) == (format, wanted.examples, ())


@pytest.mark.parametrize(
    "layout",
    [qa_answers, qa_both, qa_csv, vqav2, vqav2_by_its_questions, vqav2_by_its_annotations],
    ids=lambda layout: layout.__name__,
)
def test_the_same_questions_through_every_format(layout, pictures):
    folder = pictures(*NAMES)
    path, format = layout(folder)
    dataset = read_dataset(path, prompt=PROMPT)
    assert (dataset.format, dataset.bad) == (format, ())
    rows = [(n, Dialogue((Turn(q, a[0]),), k, tuple(a))) for n, q, a, k in QUESTIONS]
    assert plain(dataset, folder) == by_image(rows)


@pytest.mark.parametrize("where", [".", "train", "10_fox"])
@pytest.mark.parametrize("ending", [".txt", ".caption"])
def test_sidecars(where, ending, pictures):
    folder = pictures(*NAMES, into=where)
    texts = dict(reversed(CAPTIONS))
    for name, text in texts.items():
        (folder / name).with_suffix(ending).write_text(text + "\n", encoding="utf-8-sig")
    (folder / "README.txt").write_text("about these pictures")
    root = folder if where == "." else folder.parent
    dataset = read_dataset(root, prompt=PROMPT)
    assert (dataset.format, dataset.bad) == ("sidecar", ())
    expected = [(name, [Dialogue((Turn(PROMPT, texts[name]),))]) for name in NAMES]
    assert plain(dataset, folder) == expected
    assert dataset.examples[0].place == ("a.png:1" if where == "." else f"{where}/a.png:1")


def test_an_imagefolder_written_by_datasets(pictures):
    """What `datasets` itself writes and loads again, row for row."""
    datasets = pytest.importorskip("datasets")
    folder = pictures(*NAMES)
    rows = rows_of("file_name", "text")[:2] + rows_of("file_name", "text")[3:]  # it knows one row an image only
    datasets.Dataset.from_list(rows).to_json(folder / "metadata.jsonl")
    theirs = datasets.load_dataset(
        "imagefolder", data_dir=str(folder), split="train", cache_dir=str(folder.parent / "cache")
    )
    dataset = read_dataset(folder, prompt=PROMPT)
    assert dataset.bad == ()
    ours = {e.id: e.dialogues[0].turns[0].assistant for e in dataset.examples}
    assert ours == {Path(row["image"].filename).name: row["text"] for row in theirs}


def test_a_coco_file_that_pycocotools_reads(pictures):
    """Our layout of COCO in its own reader: the same captions of the same images as we find, in its order."""
    reader = pytest.importorskip("pycocotools.coco")
    path, _ = coco_file(pictures(*NAMES))
    theirs = reader.COCO(str(path))
    found = {
        theirs.loadImgs(image)[0]["file_name"]: [said["caption"] for said in theirs.loadAnns(theirs.getAnnIds(image))]
        for image in theirs.getImgIds()
    }
    ours = {e.id: [d.turns[0].assistant for d in e.dialogues] for e in read_dataset(path, prompt=PROMPT).examples}
    assert ours == found
    assert sum(map(len, found.values())) == len(CAPTIONS)


def test_a_parquet_file_written_by_datasets(pictures):
    """`to_parquet` of an Image feature; the bytes come back one by one, from any row group."""
    datasets = pytest.importorskip("datasets")
    folder = pictures(*NAMES)
    images = [embedded(folder, name) | {"path": None} for name, _ in CAPTIONS]
    data = {"image": images, "caption": [text for _, text in CAPTIONS]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(data, features=features).to_parquet(folder / "train.parquet", batch_size=2)
    dataset = read_dataset(folder / "train.parquet", prompt=PROMPT)
    expected = by_image([(name, Dialogue((Turn(PROMPT, text),))) for name, text in CAPTIONS])
    assert plain(dataset, folder) == expected
    for example in reversed(dataset.examples):
        assert content_hash(example.images[0].read_bytes()) == example.images[0].sha256


@pytest.mark.parametrize("file", ["x.jsonl", "x_questions.json"])
def test_the_best_answer_is_learnt_though_it_is_not_the_commonest(file, pictures):
    folder = pictures("a.png")
    answer = {"answers": [{"answer": text} for text in ("two", "2", "2")], "multiple_choice_answer": "two"}
    asked = {"question_id": 1, "image": "a.png", "question": "How many?"}
    if file == "x.jsonl":
        (folder / file).write_text(lines([asked | answer]))
    else:
        (folder / file).write_text(json.dumps({"questions": [asked]}))
        (folder / "x_annotations.json").write_text(json.dumps({"annotations": [{"question_id": 1} | answer]}))
    (example,) = read_dataset(folder / file, prompt=PROMPT).examples
    assert example.dialogues == (Dialogue((Turn("How many?", "two"),), None, ("two", "2", "2")),)


def test_multi_turn_and_multi_image(pictures):
    folder = pictures(*NAMES)
    turns = [
        {"from": "human", "value": "<image>\n<image>\nWhat differs?"},
        {"from": "gpt", "value": "The colour."},
        {"from": "human", "value": "Which is darker?"},
        {"from": "gpt", "value": "The first."},
    ]
    (folder / "x.jsonl").write_text(
        lines([{"image": ["b.png", "a.png"], "conversations": turns}, {"image": "b.png", "caption": "one"}])
    )
    two, one = read_dataset(folder, prompt=PROMPT).examples
    assert [ref.name for ref in two.images] == ["b.png", "a.png"]
    expected = (Turn("What differs?", "The colour."), Turn("Which is darker?", "The first."))
    assert two.dialogues == (Dialogue(expected),)
    assert one.id == "b.png"
    assert two.id == "b.png+a.png"


def test_file_names_in_several_columns_are_several_images(pictures):
    """Hugging Face's convention for a row of several; one that is null is none."""
    folder = pictures(*NAMES)
    rows = [{"left_file_name": "b.png", "right_file_name": "a.png", "text": "two"}]
    rows += [{"left_file_name": "c.png", "right_file_name": None, "text": "one"}]
    (folder / "metadata.jsonl").write_text(lines(rows))
    dataset = read_dataset(folder, prompt=PROMPT)
    assert dataset.bad == ()
    assert [example.id for example in dataset.examples] == ["b.png+a.png", "c.png"]
    assert dataset.note == "captions: image from 'left_file_name', 'right_file_name', caption from 'text'"


def test_the_input_of_an_instruction_is_a_part_of_the_question(pictures):
    folder = pictures("a.png")
    asked = {"images": ["a.png"], "instruction": "<image>Translate.", "output": "x"}
    rows = [asked | {"input": text} for text in ("b", "")]
    (folder / "x.json").write_text(json.dumps(rows))
    (example,) = read_dataset(folder, prompt=PROMPT).examples
    assert [dialogue.turns[0].user for dialogue in example.dialogues] == ["Translate.\nb", "Translate."]


def test_columns_of_another_name(pictures):
    folder = pictures("a.png")
    (folder / "x.csv").write_text("bild,beschreibung,question\na.png,ein Fuchs,unused\n")
    columns = {"image": "bild", "caption": "beschreibung"}
    dataset = read_dataset(folder, prompt=PROMPT, columns=columns)
    assert dataset.examples[0].dialogues == (Dialogue((Turn(PROMPT, "ein Fuchs"),)),)
    with pytest.raises(ConfigError, match=r"bilder.*expected one of image, caption"):
        read_dataset(folder, prompt=PROMPT, columns={"bilder": "bild"})


def test_equal_dialogues_are_all_kept_and_one_file_under_two_names_is_one_example(pictures):
    folder = pictures("images/a.png")
    names = ["images/a.png", "a.png", "./images/../images/a.png", str(folder / "images" / "a.png")]
    (folder / "x.jsonl").write_text(lines({"image": name, "caption": "same"} for name in names))
    (example,) = read_dataset(folder, prompt=PROMPT).examples
    assert len(example.dialogues) == 4
    assert (example.id, example.place) == ("images/a.png", "x.jsonl:1")


def test_the_fingerprint_follows_texts_and_order_but_not_the_place(pictures):
    def fingerprint(into, rows):
        folder = pictures(*NAMES, into=into)
        (folder / "x.jsonl").write_text(lines(rows))
        return read_dataset(folder, prompt=PROMPT).fingerprint()

    rows = rows_of("image", "caption")
    first = fingerprint("one", rows)
    assert fingerprint("two", rows) == first
    assert fingerprint("one", rows[::-1]) != first
    assert fingerprint("one", [*rows[:3], {"image": "c.png", "caption": "other"}]) != first


@pytest.mark.parametrize(("header", "caption"), [("image,caption", "  a fox"), ("image, caption", "a fox")])
def test_spaces_of_cells_stay_where_the_header_has_none(pictures, header, caption):
    folder = pictures("a.png")
    (folder / "x.csv").write_text(f"{header}\na.png,  a fox\n")
    (example,) = read_dataset(folder, prompt=PROMPT).examples
    assert example.dialogues[0].turns[0].assistant == caption


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {},
            r"nothing recognised among 3 files .3 images.; expected a caption beside each image \(cat\.txt",
        ),
        ({"a.jsonl": "", "b.jsonl": ""}, "holds 2 files of rows .a.jsonl, b.jsonl.; pass the one you mean"),
        ({f"{letter}.csv": "" for letter in "abcdefghi"}, r"holds 9 files of rows .a.csv, .* g.csv, h.csv\)"),
        ({"a.jsonl": "\n \n"}, "a.jsonl: holds no rows; expected messages:"),
        ({"a.jsonl": '{"x": 1, "y": 2}\n'}, "none of 1 rows is understood: their fields are 'x', 'y'"),
        ({"a.jsonl": "hello\n"}, "the first one is not valid JSON"),
        ({"a.csv": "image,image\n1,2\n"}, "two columns have one name"),
        ({"a.csv": b"\xff,\xff\n1,2\n"}, r"two columns have one name: '\\udcff', '\\udcff'; rename one"),
        ({"a.json": '{"cut": '}, "a.json: is not valid JSON"),
        ({"a.json": '{"images": [], "annotations": [{"bbox": []}]}'}, "is COCO without captions"),
        ({"a_questions.json": '{"questions": []}'}, "is half of VQAv2; expected the annotations"),
        ({"a.parquet": "PAR1"}, "a.parquet: is not readable as Parquet"),
        ({"a.txt": "a fox", "b.jsonl": "{}"}, "holds images with captions, and b.jsonl"),
        ({"metadata.csv": "", "metadata.jsonl": ""}, "holds metadata.csv and metadata.jsonl; keep one"),
        ({"a.jsonl": "\ufeff".encode("utf-16-le")}, "is UTF-16; save it as UTF-8"),
    ],
)
def test_what_is_not_understood_says_what_was_looked_for(files, message, pictures):
    folder = pictures(*NAMES)
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_dataset(folder, prompt=PROMPT)


def test_unknown_paths_and_formats(tmp_path):
    with pytest.raises(DataError, match="there is no such folder or file"):
        read_dataset(tmp_path / "nowhere", prompt=PROMPT)
    with pytest.raises(ConfigError, match="--format yolo: unknown; expected one of imagefolder, sidecar"):
        read_dataset(tmp_path, prompt=PROMPT, format="yolo")
    (tmp_path / "x.xlsx").touch()
    with pytest.raises(DataError, match=r"expected a folder or one of \.jsonl"):
        read_dataset(tmp_path / "x.xlsx", prompt=PROMPT)
    for format in FORMATS:
        with pytest.raises(DataError):
            read_dataset(tmp_path, prompt=PROMPT, format=format)


def test_sidecars_at_any_depth_but_not_behind_links(pictures, tmp_path):
    outside = pictures("z.png", into="outside")
    folder = pictures("a.png", "x/b.png", "deep/x/y/c.png", "deep/.trash/d.png", into="data")
    for path in [*folder.rglob("*.png"), outside / "z.png"]:
        path.with_suffix(".txt").write_text(path.stem)
    (folder / "deep/linked").symlink_to(outside)
    (folder / "deep/loop").symlink_to(folder)
    dataset = read_dataset(folder, prompt=PROMPT)
    assert [example.id for example in dataset.examples] == ["a.png", "deep/x/y/c.png", "x/b.png"]
    assert dataset.bad == ()


def test_a_row_with_a_question_and_a_caption_says_both(pictures):
    folder = pictures("a.png")
    asked = {"image": "a.png", "question": "Q?", "answer": "A"}
    rows = [asked | {"caption": "a fox"}, asked | {"answer": "", "caption": "only this"}, asked | {"caption": ""}]
    rows += [asked | {"text": "what a scanner read, perhaps", "label": 3}]
    (folder / "x.jsonl").write_text(lines(rows))
    dataset = read_dataset(folder, prompt=PROMPT)
    said = [(d.turns[0].user, d.turns[0].assistant) for d in dataset.examples[0].dialogues]
    assert said == [("Q?", "A"), (PROMPT, "a fox"), (PROMPT, "only this"), ("Q?", "A"), ("Q?", "A")]
    assert [(bad.line, bad.reason) for bad in dataset.bad] == [(2, "has an empty answer; write one, or remove the row")]
    assert dataset.note.startswith("qa: image from 'image', question from 'question', answer from 'answer', caption")


def test_what_a_folder_of_several_is_read_as_is_told(pictures, capsys):
    folder = pictures("train/a.png", "val/b.png", "test/c.png", ".cache/d.png")
    (folder / "train/a.txt").write_text("x")
    dataset = read_dataset(folder, prompt=PROMPT)
    assert dataset.unread == "train/ is read, left unread: test/, val/"
    assert dataset.taken_for == "sidecar (train/ is read, left unread: test/, val/)"
    for name in ("train.jsonl", "test.jsonl", "dataset_info.json"):
        (folder / name).write_text(lines([{"image": "train/a.png", "caption": "x"}]))
    assert read_dataset(folder, prompt=PROMPT).unread == "train.jsonl is read, left unread: test.jsonl"
    assert main(["check", str(folder)]) == 0
    assert "train.jsonl is read, left unread: test.jsonl\n" in capsys.readouterr().out


def test_images_in_a_folder_of_their_own(pictures):
    data, images = pictures("here/x.png", into="data") / "rows.json", pictures("coco/a.png", "b.png", into="images")
    outside = pictures("c.png")
    names = ["here/x.png", "coco/a.png", str(images / "b.png"), "../c.png", "gone.png", "http://127.0.0.1/x.png"]
    data.write_text(json.dumps([{"image": name, "caption": "x"} for name in names], indent=0))
    dataset = read_dataset(data, prompt=PROMPT, images=images)
    assert [example.id for example in dataset.examples] == names[:3]
    reasons = [bad.reason for bad in dataset.bad]
    assert reasons[1].endswith("(looked in ./ of the data folder); it is not in the folder of --images either")
    assert ["there is no file '../c.png'" in reasons[0], "is a URL" in reasons[2]] == [False, True]
    assert len(read_dataset(data, prompt=PROMPT).bad) == 5
    with pytest.raises(ConfigError, match=r"--images .*nowhere: there is no such folder"):
        read_dataset(data, prompt=PROMPT, images=outside / "nowhere")


FLICKR8K = 'image,caption\na.png,A child .\na.png,"A girl, running ."\n'
FLICKR30K = "image_name| comment_number| comment\na.png| 0| A child .\na.png| 1| A girl, running .\n"


@pytest.mark.parametrize(
    ("name", "images", "text"),
    [("captions.txt", "Images", FLICKR8K), ("results.csv", "flickr30k_images", FLICKR30K)],
)
def test_flickr_as_kaggle_has_it(name, images, text, pictures):
    folder = pictures(f"{images}/a.png")
    (folder / name).write_text(text)
    for path in (folder, folder / name):
        dataset = read_dataset(path, prompt=PROMPT)
        assert (dataset.format, dataset.bad, len(dataset.examples)) == ("csv", (), 1)
        said = [dialogue.turns[0].assistant.strip() for dialogue in dataset.examples[0].dialogues]
        assert said == ["A child .", "A girl, running ."]


@pytest.mark.parametrize("layout", [imagefolder_csv, captions_json, captions_parquet, coco, vqav2])
def test_rows_are_counted_while_they_are_read(layout, pictures):
    path, _ = layout(pictures(*NAMES))
    counted = []
    read_dataset(path, prompt=PROMPT, progress=counted.append)
    assert counted == [1, 2, 3, 4]
