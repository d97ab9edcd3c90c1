"""The README's table of formats: its lines, as they stand there, are read.

Run: pytest tests/data/test_readme_formats.py
"""

import re

import pytest

from tests.conftest import ROOT
from vlm_lora.data.readers import read_dataset

ROWS = re.findall(r"^\| (.+?) \| (`.+) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
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
def test_the_lines_of_the_readme_are_read(start, file, format, answers, pictures):
    folder = pictures("cat.jpg", "dog.jpg", "sub/fox.jpg" if start == "Image folder" else "sub/cat.jpg")
    start = "`.csv" if start == ".csv" else start
    (folder / file).write_text("\n".join(row(start)) + "\n")
    dataset = read_dataset(folder, prompt="Describe.")
    assert (dataset.format, dataset.bad) == (format, ())
    assert sum(len(example.dialogues) for example in dataset.examples) == answers


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
