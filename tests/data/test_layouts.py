"""One small data set in every layout that people have gives equal examples; and what is no such layout is told.

Run: pytest tests/data/test_layouts.py
"""

import json
import unicodedata
import zipfile
from types import SimpleNamespace

import datasets
import pytest

from tests.data.test_formats import PROMPT, lines, plain
from vlm_lora.cli import main
from vlm_lora.data import archives
from vlm_lora.data.example import Dialogue, Turn
from vlm_lora.data.readers import read_dataset
from vlm_lora.errors import DataError

TEXTS = {"a.png": "red fox", "b.png": "зима 雪", "c.png": "a dog"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_LORA_CACHE", str(tmp_path / "cache"))


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), "utf-8")


def move(folder, into):
    for name in TEXTS:
        path = folder / (into[name] if isinstance(into, dict) else into) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (folder / name).rename(path)


# Each writes the data set into a folder that holds the pictures, and returns what to read and its format.


def full_name_sidecars(folder):
    write(folder, {f"{name}.txt": text + "\n" for name, text in TEXTS.items()})
    return folder, "sidecar"


def twin_folders(folder):
    move(folder, "images/x")
    write(folder, {f"captions/x/{name[0]}.txt": text for name, text in TEXTS.items()})
    return folder, "sidecar"


def class_folders(folder):
    move(folder, TEXTS)
    write(folder, {"README.md": "about", "red fox/Thumbs.db": "x", "a dog/.DS_Store": "x", "desktop.ini": "x"})
    return folder, "classes"


def class_folders_in_train(folder):
    move(folder, {name: f"train/{text}" for name, text in TEXTS.items()})
    return folder, "classes"


def by_name(folder):
    write(folder, {"captions.json": TEXTS})
    return folder, "captions"


def by_name_lists(folder):
    move(folder, "images")
    write(folder, {"captions.json": {name: [text] for name, text in TEXTS.items()}})
    return folder / "captions.json", "captions"


def kohya_metadata(folder):
    meta = {name[0]: {"caption": text, "tags": "x, y", "train_resolution": [8, 6]} for name, text in TEXTS.items()}
    write(folder, {"meta_cap.json": meta})
    return folder, "captions"


def kohya_metadata_of_tags(folder):
    write(folder, {"meta.json": {str(folder / name): {"tags": text} for name, text in TEXTS.items()}})
    return folder, "captions"


def flickr_tokens(folder):
    move(folder, "Flicker8k_Dataset")
    write(folder, {"Flickr8k.token.txt": "".join(f"{name}#0\t{text}\n" for name, text in TEXTS.items())})
    return folder, "flickr"


def flickr30k_tokens(folder):
    write(folder, {"results_20130124.token": "".join(f"{name}#3\t{text} \r\n" for name, text in TEXTS.items())})
    return folder / "results_20130124.token", "flickr"


def flickr30k_csv(folder):
    rows = "".join(f"{name}| 0| {text}\n" for name, text in TEXTS.items())
    write(folder, {"results.csv": "image_name| comment_number| comment\n" + rows})
    return folder, "csv"


def label_studio_task(name, results, **more):
    annotation = {"id": 1, "completed_by": 1, "was_cancelled": False, "result": results}
    return {"id": 7, "data": {"captioning": name}, "annotations": [annotation], "predictions": [], **more}


def typed(text, **more):
    said = {"value": {"text": [text]}, "id": "x", "from_name": "caption", "to_name": "image", "type": "textarea"}
    return said | more


def label_studio(folder):
    rows = [label_studio_task(f"/data/upload/3/0a1b2c3d-{name}", [typed(text)]) for name, text in TEXTS.items()]
    write(folder, {"project-3-at-2026.json": rows})
    return folder, "captions"


def label_studio_of_a_folder(folder):
    move(folder, "images")
    rows = [label_studio_task(f"/data/local-files/?d=images/{name}", [typed(text)]) for name, text in TEXTS.items()]
    write(folder, {"export.json": rows})
    return folder, "captions"


def label_studio_under_our_name(folder):
    rows = [label_studio_task(None, [typed(text)], data={"image": name}) for name, text in TEXTS.items()]
    write(folder, {"export.json": rows})
    return folder, "captions"


def label_studio_min(folder):
    rows = [{"id": 1, "image": f"/data/upload/3/0a1b2c3d-{name}", "caption": text} for name, text in TEXTS.items()]
    write(folder, {"export.json": rows})
    return folder, "captions"


def windows_names(folder):
    move(folder, "photos/x")
    write(folder, {"rows.jsonl": lines({"image": f"photos\\x\\{n}", "caption": t} for n, t in TEXTS.items())})
    return folder, "captions"


def names_without_ending(folder):
    write(folder, {"rows.jsonl": lines({"image": name[0], "caption": text} for name, text in TEXTS.items())})
    return folder, "captions"


def saved(folder, *, path=True):
    rows = {"image": [str(folder / name) for name in TEXTS], "text": list(TEXTS.values())}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def save_to_disk(folder):
    saved(folder).save_to_disk(folder / "saved")
    return folder / "saved", "arrow"


def save_to_disk_in_parts(folder):
    datasets.DatasetDict(train=saved(folder)).save_to_disk(folder / "saved")
    return folder / "saved", "arrow"


def labelled(folder):
    names = sorted(TEXTS.values())
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {"image": [str(folder / n) for n in TEXTS], "label": [names.index(t) for t in TEXTS.values()]}
    return datasets.Dataset.from_dict(rows, features=features)


def parquet_class_labels(folder):
    labelled(folder).to_parquet(folder / "train.parquet")
    return folder / "train.parquet", "parquet"


def saved_class_labels(folder):
    labelled(folder).save_to_disk(folder / "saved")
    return folder / "saved", "arrow"


LAYOUTS = [
    full_name_sidecars,
    twin_folders,
    class_folders,
    class_folders_in_train,
    by_name,
    by_name_lists,
    kohya_metadata,
    kohya_metadata_of_tags,
    flickr_tokens,
    flickr30k_tokens,
    flickr30k_csv,
    label_studio,
    label_studio_of_a_folder,
    label_studio_under_our_name,
    label_studio_min,
    windows_names,
    names_without_ending,
    save_to_disk,
    save_to_disk_in_parts,
    parquet_class_labels,
    saved_class_labels,
]
EXPECTED = {name: [Dialogue((Turn(PROMPT, text),))] for name, text in TEXTS.items()}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("zipped", [False, True], ids=["", "zip"])
def test_the_same_data_in_every_layout(layout, zipped, pictures):
    folder = pictures(*TEXTS, into="data")
    path, format = layout(folder)
    if zipped:
        archive = folder.parent / "data.zip"
        root = path if path.is_dir() else path.parent
        with zipfile.ZipFile(archive, "w") as file:
            for each in sorted(root.rglob("*")):
                file.write(each, f"around/{each.relative_to(root).as_posix()}")
        path = archive
    dataset = read_dataset(path, prompt=PROMPT, allow_outside=zipped)
    assert (dataset.format, dataset.bad) == (format, ())
    assert dict(plain(dataset, folder)) == EXPECTED
    assert all(example.weight == 1 for example in dataset.examples)


# What looks like one of these and is not, or holds something else beside: files -> the error, or the bad rows

REFUSED = {
    "dates": (("2021/a.png", "2022/b.png"), {}, "as a folder is called '2021'; --format classes does"),
    "masks": (("fox/a.png", "masks/a.png"), {}, "as a folder is called 'masks'"),
    "a camera's": (("100CANON/a.png", "101CANON/b.png"), {}, "as a folder is called '100CANON'"),
    "one folder": (("fox/a.png",), {}, "as not each image lies in one of several folders"),
    "deeper": (("animals/fox/a.png", "animals/cat/b.png"), {}, "as not each image lies in one of several folders"),
    "one on top": (("fox/a.png", "cat/b.png", "c.png"), {}, "as not each image lies in one of several folders"),
    "tables below": (("fox/a.png", "cat/b.png"), {"cat/labels.csv": "x"}, "other files too, as 'cat/labels.csv'"),
    "boxes of YOLO": (("images/a.png",), {"labels/a.txt": "0 .5 .5 .1 .1"}, "nothing recognised among 2 files"),
    "test alone": ((), {"dataset_dict.json": "{}", "test/state.json": "{}"}, "holds test/, and no train/"),
    "no train": ((), {"dataset_dict.json": "{}", "a/state.json": "{}", "b/x": ""}, "holds a/, b/, and no train/"),
    "zip inside": (("a.png",), {"more.zip": "x"}, "to read 'more.zip', pass it itself"),
    "no arrow": ((), {"state.json": "{}", "dataset_info.json": "{}"}, "cannot be read as `datasets` saves it"),
    "arrow elsewhere": (
        (),
        {"state.json": {"_data_files": [{"filename": "../x.arrow"}]}, "dataset_info.json": "{}"},
        r"names '../x.arrow', which is no file of this folder",
    ),
}


@pytest.mark.parametrize("trap", REFUSED)
def test_what_is_no_such_layout_is_refused(trap, pictures):
    names, files, reason = REFUSED[trap]
    folder = pictures(*names, into="data")
    write(folder, files)
    with pytest.raises(DataError, match=reason.replace(".", r"\.").replace("(", r"\(")):
        read_dataset(folder, prompt=PROMPT)


BAD = {
    "captions below classes": (("fox/a.png", "cat/b.png"), {"fox/a.txt": "x"}, 1, ["has no caption; expected 'b.txt'"]),
    "two captions": (("a.png",), {"a.txt": "x", "a.png.txt": "y"}, 0, ["has 2 captions: 'a.txt', 'a.png.txt'"]),
    "twins and beside": (
        ("images/a.png", "images/b.png"),
        {"images/a.txt": "x", "captions/a.txt": "y", "captions/b.txt": "z"},
        1,
        ["has 2 captions: 'a.txt', 'a.txt'; keep one"],
    ),
    "twins apart": (
        ("images/a.png", "images/b.png"),
        {"captions/a.txt": "x", "captions/c.txt": "y"},
        1,
        ["has no caption; expected 'b.txt' in captions/", "is a caption without an image of its name"],
    ),
    "a name that is no image": (
        ("a.png", "b.png"),
        {"x.json": {"a.png": "x", "b.png": "y", "version": 3}},
        2,
        ["there is no file 'version'"],
    ),
    "two of one stem": (("a.png", "a.gif"), {"x.json": [{"image": "a", "caption": "x"}]}, 0, ["'a' may be 'a.gif' or"]),
    "a drive": (
        ("a.png",),
        {"x.json": [{"image": "C:\\me\\set\\a.png", "caption": "x"}]},
        0,
        ["is a place on a Windows computer; write the name below the data's folder, as 'set/a.png'"],
    ),
    "out by backslashes": (
        ("a.png",),
        {"../out.png": "x", "x.json": [{"image": "..\\out.png", "caption": "x"}]},
        0,
        ["lies outside of the data folder"],
    ),
    "no token": (("a.png",), {"x.token": "a.png#0\tx\na.png y\n\n"}, 1, ["is 'a.png y'; expected a name of an image"]),
    "numbers of Label Studio": (
        ("a.png",),
        {
            "x.json": [
                label_studio_task("a.png", [typed("x")]),
                label_studio_task("a.png", [{"type": "textarea", "value": {"text": ["x", 3]}}]),
            ]
        },
        1,
        ["has a result of the type 'textarea'"],
    ),
    "boxes of Label Studio": (
        ("a.png",),
        {"x.json": [label_studio_task("a.png", [typed("x"), {"type": "rectanglelabels", "value": {"x": 1}}])]},
        0,
        ["has a result of the type 'rectanglelabels'"],
    ),
    "of no annotator": (
        ("a.png",),
        {"x.json": [label_studio_task("a.png", [typed("x")]), {"data": {"image": "a.png"}, "annotations": []}]},
        1,
        ["is a task that nobody has labelled"],
    ),
    "no results": (
        ("a.png",),
        {
            "x.json": [
                label_studio_task("a.png", [typed("x")]),
                *({"data": {"image": "a.png"}, "annotations": [each]} for each in ("x", {"result": "x"}, {})),
            ]
        },
        1,
        ["has an annotation without a list of results"] * 3,
    ),
    "skipped": (
        ("a.png",),
        {"x.json": [{"data": {"image": "a.png"}, "annotations": [{"result": [], "was_cancelled": True}]}] * 2},
        0,
        ["was skipped by who labelled it"] * 2,
    ),
}


@pytest.mark.parametrize("trap", BAD)
def test_what_is_wrong_in_a_layout_is_a_bad_row(trap, pictures):
    names, files, answers, reasons = BAD[trap]
    folder = pictures(*names, into="data")
    write(folder, files)
    if trap in ("two of one stem", "a drive", "out by backslashes", "boxes of Label Studio", "skipped"):
        write(folder, {"x.json": [{"image": "a.png", "caption": "good"}, *files["x.json"]]})
        answers += 1
    dataset = read_dataset(folder, prompt=PROMPT)
    assert sum(len(example.dialogues) for example in dataset.examples) == answers
    assert len(dataset.bad) == len(reasons), dataset.bad
    for row, reason in zip(dataset.bad, reasons, strict=True):
        assert reason in row.reason


def said(dataset):
    return [
        (e.id, d.turns[0].assistant, d.split)
        for e in dataset.examples + dataset.val + dataset.test
        for d in e.dialogues
    ]


def test_what_is_only_like_another_layout_stays_what_it_is(pictures):
    folder = pictures("a.png", "a.gif")
    write(folder, {"a.png.txt": "one", "a.gif.txt": "other"})  # each has its own
    assert {(id, text) for id, text, _ in said(read_dataset(folder, prompt=PROMPT))} == {
        ("a.png", "one"),
        ("a.gif", "other"),
    }
    write(folder, {"deep.json": {"a.png": [{"question": "x", "answer": "y"}]}})
    assert "no text but dict" in read_dataset(folder / "deep.json", prompt=PROMPT).bad[0].reason
    write(folder, {"one.json": {"image": "a.png", "caption": "x"}})
    assert said(read_dataset(folder / "one.json", prompt=PROMPT)) == [("a.png", "x", "")]
    (folder / "two.json").write_text('{"a.png": "x", "a.gif": ["y", "z"], "a.png": "w"}')
    assert said(read_dataset(folder / "two.json", prompt=PROMPT)) == [
        ("a.png", "x", ""), ("a.png", "w", ""), ("a.gif", "y", ""), ("a.gif", "z", "")
    ]  # fmt: skip


def test_masks_beside_images_and_captions_are_left_alone(pictures):
    folder = pictures("images/a.png", "masks/a.png", into="set")
    write(folder, {"captions/a.txt": "x", "README.md": "about"})
    dataset = read_dataset(folder, prompt=PROMPT)
    assert (said(dataset), dataset.bad) == ([("images/a.png", "x", "")], ())
    assert dataset.unread == "images/ is read, left unread: README.md, masks/"
    pictures("more/b.png", into="set")
    write(folder, {"more/b.txt": "y"})  # captions of both kinds: nothing is left alone
    dataset = read_dataset(folder, prompt=PROMPT)
    assert said(dataset) == [("images/a.png", "x", ""), ("more/b.png", "y", "")]
    assert [row.source for row in dataset.bad] == ["masks/a.png"]


def test_a_linked_folder_of_captions_is_not_entered(pictures, tmp_path):
    folder = pictures("images/a.png", into="set")
    write(tmp_path / "elsewhere", {"a.txt": "x"})
    (folder / "captions").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="nothing recognised among 1 files"):
        read_dataset(folder, prompt=PROMPT)


def test_classes_where_they_are_asked_for(pictures):
    folder = pictures("2021/a.png", "x/2022/b.png", "c.png")
    dataset = read_dataset(folder, prompt="Which?", format="classes")
    assert said(dataset) == [("2021/a.png", "2021", ""), ("x/2022/b.png", "2022", "")]
    assert [(row.source, row.reason.split(";")[0]) for row in dataset.bad] == [
        ("c.png", "lies in no folder of a class")
    ]
    assert dataset.taken_for.startswith("classes (the name of each image's folder is learnt, as the answer to 'Which?'")


def test_classes_are_answers_also_in_a_clean_copy(pictures, tmp_path, capsys):
    folder = pictures("cat/a.png", "fox/b.png", into="set")
    dataset = read_dataset(folder, prompt=PROMPT)
    assert main(["check", str(folder), "--prompt", PROMPT, "--write-clean", str(tmp_path / "clean")]) == 0
    clean = read_dataset(tmp_path / "clean", prompt=PROMPT)
    assert said(clean) == said(dataset)
    assert [d.caption for e in (*dataset.examples, *clean.examples) for d in e.dialogues] == [False] * 4
    (example, _) = read_dataset(tmp_path / "clean", prompt=PROMPT, columns="caption=label").examples
    assert example.dialogues[0].caption


def test_labels_are_named_and_none_is_no_label(pictures):
    folder = pictures("a.png", into="data")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [str(folder / "a.png")] * 2, "label": [1, -1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "x.parquet")
    dataset = read_dataset(folder / "x.parquet", prompt=PROMPT)
    assert [text for _, text, _ in said(dataset)] == ["dog"]
    assert dataset.note == "captions: image from 'image', caption from 'label' (the names of its classes)"
    assert [row.reason for row in dataset.bad] == ["has an empty caption; write one, or remove the row"]


def test_what_label_studio_chose_and_several_annotators(pictures):
    folder = pictures("a.png")
    chosen = {
        "value": {"choices": ["fox", "red"]},
        "from_name": "kind_of_animal",
        "to_name": "image",
        "type": "choices",
    }
    task = label_studio_task("a.png", [chosen])
    task["annotations"] *= 2
    write(folder, {"x.json": [task]})
    with pytest.raises(DataError, match=r"their fields are 'image', 'kind_of_animal'.*--columns caption=NAME"):
        read_dataset(folder, prompt=PROMPT)
    asked = [typed("Which?", from_name="question"), typed("A fox", from_name="answer")]
    write(folder, {"y.json": [label_studio_task("a.png", asked)]})
    (example,) = read_dataset(folder / "y.json", prompt=PROMPT).examples
    assert example.dialogues[0].turns == (Turn("Which?", "A fox"),)
    dataset = read_dataset(folder / "x.json", prompt=PROMPT, columns="caption=kind_of_animal")
    assert said(dataset) == [("a.png", "fox, red", "")] * 2


@pytest.mark.parametrize("text", [True, False], ids=["captions", "classes"])
def test_the_folders_of_kohya_say_how_often(text, pictures, capsys):
    folder = pictures("10_red fox/a.png", "2_cat/b.png", into="set")
    if text:
        write(folder, {"10_red fox/a.txt": "x", "2_cat/b.txt": "y"})
    dataset = read_dataset(folder, prompt=PROMPT)
    assert [e.weight for e in dataset.examples] == [10, 2]
    assert [answer for _, answer, _ in said(dataset)] == (["x", "y"] if text else ["red fox", "cat"])
    assert "times an epoch, as kohya's folders say: 10_red fox/ 10, 2_cat/ 2" in dataset.taken_for
    others = pictures("z.png", into="others")
    write(others, {"z.txt": "z"})
    many = pictures(*(f"{times}_x/{times}.png" for times in range(1, 12)), into="many")
    assert read_dataset(many, prompt=PROMPT).taken_for.endswith("6_x/ 6, and 3 more)")
    both = read_dataset([f"{folder}:3", others], prompt=PROMPT)
    assert [e.weight for e in both.examples] == [30, 6, 1]
    assert main(["check", str(folder)]) == 0
    assert "as kohya's folders say: 10_red fox/ 10" in capsys.readouterr().out


def test_kohyas_own_folder_around_its_folders_of_images(pictures):
    folder = pictures("img/5_fox/a.png", into="set")
    write(folder, {"img/5_fox/a.txt": "x", "log/x": "", "model/x.safetensors": "x"})
    assert [e.weight for e in read_dataset(folder, prompt=PROMPT).examples] == [5]


@pytest.mark.parametrize(
    ("names", "once"),
    [
        (("10_fox/a.png", "cat/b.png"), "10_fox/ counts once: not all images lie in folders of such names"),
        (("01_fox/a.png", "02_cat/b.png"), ""),
        (("1/5_fox/a.png", "2/5_fox/b.png"), "5_fox/ counts once"),
    ],
)
def test_folders_that_are_not_kohyas_say_nothing(names, once, pictures):
    folder = pictures(*names)
    write(folder, {name.replace(".png", ".txt"): "x" for name in names})
    dataset = read_dataset(folder, prompt=PROMPT)
    assert [e.weight for e in dataset.examples] == [1, 1]
    assert once in dataset.note
    assert bool(once) == ("once" in dataset.note)


def test_other_parts_in_folders_of_their_own_are_held_out(pictures):
    folder = pictures("train/a.png", "validation/b.png", "test/c.png", "extra/d.png", into="set")
    for name in ("train/a", "validation/b"):
        write(folder, {f"{name}.txt": name})
    dataset = read_dataset(folder, prompt=PROMPT)  # test/ has no captions: it is no part that can be read
    assert said(dataset) == [("train/a.png", "train/a", ""), ("validation/b.png", "validation/b", "val")]
    assert dataset.unread == "train/ is read, held out: validation/, left unread: extra/, test/"
    write(
        folder, {"test/metadata.jsonl": '{"file_name": "c.png", "text": "x"}\n{"file_name": "gone.png", "text": "x"}'}
    )
    dataset = read_dataset(folder, prompt=PROMPT)
    assert [len(side) for side in (dataset.examples, dataset.val, dataset.test)] == [1, 1, 1]
    assert [row.place for row in dataset.bad] == ["test/metadata.jsonl:2"]
    (folder / "val").mkdir()  # two of one part: none is taken unasked
    assert read_dataset(folder, prompt=PROMPT).val == ()


def test_what_datasets_saved_in_parts(pictures):
    folder = pictures(*TEXTS, into="data")
    parts = {"train": saved(folder), "validation": saved(folder).select([1]), "test": saved(folder).select([2, 0])}
    datasets.DatasetDict(parts).save_to_disk(folder / "saved")
    dataset = read_dataset(folder / "saved", prompt=PROMPT)
    assert [len(side) for side in (dataset.examples, dataset.val, dataset.test)] == [3, 1, 2]
    assert {e.dialogues[0].split for e in dataset.test} == {"test"}
    assert dataset.examples[0].place == "saved/train:1"
    assert dataset.unread == "train/ is read, held out: validation/, test/"
    (folder / "saved/train/evil.pkl").write_bytes(b"cos\nsystem\n(S'touch /tmp/evil'\ntR.")  # is left where it is
    state = json.loads((folder / "saved/train/state.json").read_text())
    arrow = folder / "saved/train" / state["_data_files"][0]["filename"]
    data = arrow.read_bytes()
    at = data.index(TEXTS["a.png"].encode()) - 64  # where the texts begin, in the offsets: beyond the end
    arrow.write_bytes(data[:at] + b"\x7f" * 64 + data[at + 64 :])
    with pytest.raises(DataError, match="saved/train: none of 3 rows is understood: the first one cannot be read: "):
        read_dataset(folder / "saved", prompt=PROMPT)


def test_captions_in_folders_of_other_parts_are_held_out_without_train(pictures):
    folder = pictures("a.png", "val/b.png", "test/x/c.png", "more/val/d.png", into="set")
    write(folder, {f"{name}.txt": name for name in ("a", "val/b", "test/x/c", "more/val/d")})
    dataset = read_dataset(folder, prompt=PROMPT)
    assert [[e.id for e in side] for side in (dataset.examples, dataset.val, dataset.test)] == [
        ["a.png", "more/val/d.png"], ["val/b.png"], ["test/x/c.png"]
    ]  # fmt: skip


NAME = "Gr\u00fcn \u00e9.png"


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_letters_and_accents_are_matched_however_they_are_kept(form, pictures):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    on_disk, written = unicodedata.normalize(form, NAME), unicodedata.normalize(other, NAME)
    assert on_disk != written
    folder = pictures(on_disk, into="rows")
    write(folder, {"metadata.jsonl": lines([{"file_name": written, "text": "x"}])})
    dataset = read_dataset(folder, prompt=PROMPT)
    assert (len(dataset.examples), dataset.bad) == (1, ())
    folder = pictures(on_disk, into="beside")
    write(folder, {written.replace(".png", ".txt"): "x"})
    dataset = read_dataset(folder, prompt=PROMPT)
    assert (len(dataset.examples), dataset.bad) == (1, ())


def test_what_windows_wrote_is_told(pictures):
    folder = pictures("a.png")
    (folder / "x.csv").write_bytes("image,caption\na.png,x\ngrün.png,x\na.png,“café”\n".encode("cp1252"))
    good = b'{"image": "a.png", "caption": "x"}\n'
    (folder / "x.jsonl").write_bytes(good + b'{"image": "a.png", "caption": "\x81\x8d"}\n')
    name, caption = (row.reason for row in read_dataset(folder / "x.csv", prompt=PROMPT).bad)
    assert "has a name that is not UTF-8 (as Windows-1252, which Excel and Notepad write, it says 'grün.png')" in name
    assert caption.endswith("save the file as UTF-8 (as Windows-1252, which Excel and Notepad write, it says '“café”')")
    (row,) = read_dataset(folder / "x.jsonl", prompt=PROMPT).bad
    assert row.reason.endswith("save the file as UTF-8")  # no letters of Windows either


# Archives


def zipped(path, members, **options):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


def link(name):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, 0o120777 << 16
    return info


ZIPS = {
    "out": ([("../out.txt", "x")], "holds the name '../out.txt', which leads out"),
    "far out": ([("a/../../out.txt", "x")], "which leads out"),
    "absolute": ([("/tmp/vlm-lora-out.txt", "x")], "which leads out"),
    "backslashes": ([("..\\out.txt", "x")], "which leads out"),
    "drive": ([("C:\\out.txt", "x")], "which leads out"),
    "hidden and out": ([("../.hidden", "x")], "which leads out"),
    "link": ([(link("a.png"), "/etc/passwd")], "holds 'a.png', which is a link"),
    "twice": ([("a.png", "x"), ("./a.png", "y")], "holds './a.png' twice"),
    "file and folder": ([("a", "x"), ("a/b.png", "y")], "cannot be unpacked"),
    "empty": ([], "holds no file"),
    "hidden alone": ([("__MACOSX/a.png", "x"), (".git/b.png", "x")], "holds no file"),
    "bomb": ([(f"{n}.bmp", bytes(1 << 20)) for n in range(6)], "would take 6,291,456 bytes, more than 100 times"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("trap", ZIPS)
def test_an_archive_writes_nothing_but_its_own_folder(trap, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MOST_SMALL", 1 << 20)
    members, reason = ZIPS[trap]
    archive = zipped(tmp_path / "data.zip", members)
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    with pytest.raises(DataError, match=reason.replace(".", r"\.")):
        read_dataset(archive, prompt=PROMPT)
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before
    assert [path.suffix for path in (tmp_path / "cache/archives").iterdir()] == [".lock"]


def test_an_archive_with_a_password_or_of_more_than_fits(tmp_path, monkeypatch):
    archive = zipped(tmp_path / "x.zip", [("a.png", "x")])
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1))
    with pytest.raises(DataError, match="would take 1 bytes of the 1 that are free"):
        read_dataset(archive, prompt=PROMPT)
    data = bytearray(archive.read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + flags] |= 1
    archive.write_bytes(data)
    with pytest.raises(DataError, match="is protected by a password"):
        read_dataset(archive, prompt=PROMPT)


def test_damage_in_an_archive_leaves_nothing_behind(pictures, tmp_path):
    folder = pictures("a.png", into="set")
    archive = zipped(tmp_path / "x.zip", [("a.png", (folder / "a.png").read_bytes()), ("a.txt", "a fox" * 20)])
    whole = archive.read_bytes()
    for at in range(0, len(whole), 7):
        archive.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            dataset = read_dataset(archive, prompt=PROMPT)
        except DataError:
            continue
        assert said(dataset) == [("a.png", "a fox" * 20, "")] or dataset.bad or dataset.format == "sidecar"
    archive.write_bytes(whole)
    assert said(read_dataset(archive, prompt=PROMPT)) == [("a.png", "a fox" * 20, "")]
    archive.write_bytes(whole[:-30])
    with pytest.raises(DataError, match=r"x\.zip: is not readable as a zip"):
        read_dataset(archive, prompt=PROMPT)
    assert not [path for path in (tmp_path / "cache/archives").iterdir() if path.name.startswith("unpacking")]


def test_a_small_archive_or_a_large_one_may_be_what_only_one_limit_allows(pictures, tmp_path, monkeypatch):
    picture = (pictures("a.png", into="set") / "a.png").read_bytes()
    members = [("a.png", picture), ("a.txt", "x" * 200_000)]
    archive = zipped(tmp_path / "x.zip", members)
    assert archives.MOST_GROWTH * archive.stat().st_size < 200_000
    assert len(read_dataset(archive, prompt=PROMPT).examples) == 1
    monkeypatch.setattr(archives, "MOST_SMALL", 0)
    assert (
        len(read_dataset(zipped(tmp_path / "y.zip", [members[0], ("a.txt", "y" * 5_000)]), prompt=PROMPT).examples) == 1
    )


def test_an_archive_is_unpacked_once_and_cleared_with_the_cache(pictures, tmp_path, capsys):
    folder = pictures("10_fox/a.png", into="set")
    members = [("10_fox/a.png", (folder / "10_fox/a.png").read_bytes()), ("10_fox/a.txt", "x")]
    members += [("notes.md", "x"), ("./", "")]
    archive = zipped(tmp_path / "x.zip", members[:2])
    first = read_dataset(archive, prompt=PROMPT)
    assert [e.weight for e in first.examples] == [10]  # the one folder around everything says so
    place = first.examples[0].images[0].path
    assert first.unread == f"unpacked into {place.parents[1]}"
    inode = place.stat().st_ino
    again = read_dataset([str(archive), str(zipped(tmp_path / "y.zip", members))], prompt=PROMPT)
    assert [e.id for e in again.examples] == [f"{tmp_path}/{name}.zip/10_fox/a.png" for name in "xy"]
    assert place.stat().st_ino == inode
    assert main(["cache", "--clear"]) == 0
    assert "what was unpacked of .zip files" in capsys.readouterr().out
    assert not place.exists()
    assert [e.weight for e in read_dataset(archive, prompt=PROMPT).examples] == [10]
