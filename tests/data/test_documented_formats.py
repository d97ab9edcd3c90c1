"""The table of formats in docs/data.md: its lines, as they stand there, are read.

Run: pytest tests/data/test_documented_formats.py
"""

import io
import json
import re
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import ROOT
from vlm_lora.data.readers import read_dataset
from vlm_lora.errors import DataError

ROWS = re.findall(r"^\| (.+?) \| (`.+) \|$", (ROOT / "docs/data.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
LINES = {name: [line.strip("`") for line in shown.split("<br>")] for name, shown in ROWS}


def row(start):
    (found,) = [lines for name, lines in LINES.items() if name.startswith(start)]
    assert len(found) == 3
    return found


@pytest.mark.parametrize(
    ("start", "file", "format", "answers"),
    [
        ("Image folder", "metadata.jsonl", "imagefolder", 4),
        ("Captions: ", "x.jsonl", "captions", 3),
        ("Questions", "x.jsonl", "qa", 3),
        ("Chat", "x.json", "messages", 1),
        ("ShareGPT", "x.json", "conversations", 1),
        ("Query", "x.jsonl", "query-response", 3),
        ("COCO", "captions.json", "coco", 2),
        (".csv", "x.csv", "csv", 2),
    ],
)
def test_the_documented_lines_are_read(start, file, format, answers, pictures):
    folder = pictures("cat.jpg", "dog.jpg", "sub/fox.jpg" if start == "Image folder" else "sub/cat.jpg")
    start = "`.csv" if start == ".csv" else start
    (folder / file).write_text("\n".join(row(start)) + "\n")
    dataset = read_dataset(folder, prompt="Describe.")
    assert (dataset.format, dataset.bad) == (format, ())
    assert sum(len(example.dialogues) for example in dataset.examples) == answers


def test_parquet(pictures):
    """`image: {bytes, path}, or a file name`: both, under the names of the table."""
    folder = pictures("cat.jpg")
    (image, path_too), (text, said) = (line.split(": ", 1) for line in row("`.parquet")[:2])
    assert path_too == "{bytes, path}`, or a file name"
    cells = [{"bytes": (folder / "cat.jpg").read_bytes(), "path": "cat.jpg"}, "cat.jpg"]
    for number, cell in enumerate(cells):
        rows = [{image: cell, text: json.loads(said)}]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{number}.parquet")
        (example,) = read_dataset(folder / f"{number}.parquet", prompt="Describe.").examples
        assert example.dialogues[0].turns[0].assistant == "A cat."
    shards = [row("`.csv"), row("Questions")]  # "or any columns of the rows above"
    fields = [dict(zip(shards[0][0].split(","), shards[0][1].split(","), strict=True)), json.loads(shards[1][0])]
    for number, values in enumerate(fields):
        pq.write_table(pa.Table.from_pylist([values]), folder / f"any{number}.parquet")
        assert len(read_dataset(folder / f"any{number}.parquet", prompt="Describe.").examples) == 1


def test_webdataset(pictures):
    folder = pictures("cat.jpg")
    members = [name for line in row("WebDataset")[:2] for name in re.findall(r"\w+\.\w+", line)]
    assert [Path(name).suffix for name in members] == [".jpg", ".txt", ".png", ".json"]
    fields = row("Captions: ")[0].encode()  # "the fields of a row above"
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name in members:
            content = {".txt": b"A cat.", ".json": fields}.get(Path(name).suffix, (folder / "cat.jpg").read_bytes())
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    dataset = read_dataset(folder / "x.tar", prompt="Describe.")
    assert (dataset.format, dataset.bad) == ("webdataset", ())
    assert [d.turns[0].assistant for e in dataset.examples for d in e.dialogues] == ["A cat.", "A cat."]


def test_hub(monkeypatch):
    """Every name of the table is asked of `datasets` for the part that it says."""
    asked = []

    def load_dataset(name, config, split, streaming=False):
        asked.append((name, config, split, streaming))
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in row("The Hugging Face hub"):
        with pytest.raises(DataError, match="no network in tests"):
            read_dataset(name.split("`")[0], prompt="Describe.")
    assert asked == [
        ("owner/name", None, "train", False),
        ("owner/name", "config", "train[:1000]", False),
        ("owner/name", None, "train", True),
    ]


def test_vqav2(pictures):
    folder = pictures("1.jpg")
    questions, *annotations = row("VQAv2")
    (folder / "x_questions.json").write_text(questions)
    (folder / "x_annotations.json").write_text("".join(annotations))
    (example,) = read_dataset(folder, prompt="Describe.").examples
    assert example.dialogues[0].accepted == ("no", "yes")


def test_sidecars(pictures):
    names = re.findall(r"[\w/.]+\.\w+", " ".join(row("Captions beside")))
    images = [name for name in names if not name.endswith((".txt", ".caption"))]
    folder = pictures(*images)
    for name in set(names) - set(images):
        (folder / name).write_text("a caption")
    dataset = read_dataset(folder, prompt="Describe.")
    assert (dataset.format, dataset.bad, len(dataset.examples)) == ("sidecar", (), 3)
