"""The fuzz harness itself (tests/data/fuzz.py): some of its cases, and that it sees what it looks for.

Run: pytest tests/data/test_fuzz.py
"""

import csv
import json
import random

import vlm_lora.data.readers.sources as sources
from tests.data import fuzz
from tests.data.fuzz import make_case, run_case
from vlm_lora.config import TrainConfig
from vlm_lora.data.readers import tables
from vlm_lora.data.readers.boxes import BoxReader
from vlm_lora.data.readers.fields import Ledger
from vlm_lora.data.readers.gather import gather
from vlm_lora.errors import DataError


def test_every_row_of_damaged_data_is_an_answer_or_a_bad_row():
    ended = [run_case(number) for number in range(80)]
    assert set(ended) == {"good", "bad rows", "refused"}


def test_a_row_that_gets_lost_is_found(monkeypatch):
    """The control: without the last row of each data set, cases fail."""
    monkeypatch.setattr(sources, "gather", lambda format, found: gather(format, list(found)[:-1]))
    failed = 0
    for number in range(30):
        try:
            run_case(number)
        except AssertionError as error:
            failed += "rows, expected" in str(error)
    assert failed > 10


def test_a_field_that_gets_lost_is_found(monkeypatch):
    """The control of what becomes of fields: where those that nothing takes up are passed over in silence."""

    told = "nothing tells what became of"

    def lost() -> int:
        failed = 0
        monkeypatch.setattr(fuzz, "CONTAINERS", ("jsonl",))
        for number in range(80):
            try:
                run_case(number)
            except AssertionError as error:
                failed += told in str(error)
        return failed

    assert lost() == 0
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "close", lambda self, fields, whose="", has_images=True: None)
        assert lost() > 3
    told = "boxes in rows that are good"
    monkeypatch.setattr(BoxReader, "with_objects", lambda self, said, objects, images: said)
    monkeypatch.setattr(sources, "require_plain", lambda dialogue: None)
    assert lost() > 3


def test_a_row_that_a_stray_quote_takes_along_is_found(monkeypatch):
    """The control of what is counted in damaged CSV: with a reader that goes on after the whole of a bad record."""

    def lost() -> int:
        failed = 0
        for number in range(80):
            monkeypatch.setattr(fuzz, "CONTAINERS", ("csv", "tsv"))
            try:
                run_case(number)
            except AssertionError as error:
                failed += "rows, expected" in str(error)
        return failed

    def records(lines, delimiter):
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except csv.Error as error:
                cells = str(error)
            except StopIteration:
                return
            if cells:
                yield line, cells if len(cells) == 2 or isinstance(cells, str) else "other cells than the header"

    assert lost() == 0
    monkeypatch.setattr(tables, "_records", records)
    assert lost() >= 2


def test_a_record_is_added_to_those_that_are_there(tmp_path, monkeypatch):
    file = tmp_path / "fuzz.json"
    file.write_text('{"what": "by hand", "runs": [{"cases": 1}]}')
    monkeypatch.setattr(fuzz, "run", lambda seconds, first: {"cases": 2, "findings": []})
    monkeypatch.setattr("sys.argv", ["fuzz", "--record", str(file)])
    assert fuzz.main() == 0
    kept = json.loads(file.read_text())
    assert (kept["what"], [run["cases"] for run in kept["runs"]]) == ("by hand", [1, 2])


def test_what_is_trained_and_what_is_quarantined_are_all_rows(tmp_path, monkeypatch):
    """The same through a run, up to its steps: the lessons, the held-out ones, and the file that lists the rest."""
    import vlm_lora.training.run as run

    given = {}

    def run_steps(loop, allow_change, captions):
        given["lessons"] = [*loop.examples, *loop.data.held_out]
        loop.folder.begin(loop.config, 0, loop.data.bad_rows)
        return 0

    monkeypatch.setattr(run, "_attached", _once(run._attached))
    monkeypatch.setattr(run.TrainingLoop, "run", run_steps)
    trained = 0
    for number in range(5):
        folder = tmp_path / str(number)
        folder.mkdir()
        path, least, most = make_case(random.Random(number), folder)
        config = TrainConfig(
            data=str(path), model="tiny", output=str(folder / "run"), on_bad_row="quarantine", val_split=0.0
        )
        try:
            run.train_adapter(config)
        except DataError:  # no row of it can be used, or the file is no such thing
            continue
        listed = folder / "run/quarantined.jsonl"
        bad = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
        assert all(json.loads(row)["reason"] for row in bad)
        rows = len(bad) + sum(len(lesson.example.dialogues) for lesson in given["lessons"])
        assert least <= rows <= (most or rows), number
        trained += 1
    assert trained >= 2


def _once(make):
    """What `make` gives the first time, every time."""
    made = []

    def give(*arguments, **named):
        if not made:
            made.append(make(*arguments, **named))
        return made[0]

    return give
