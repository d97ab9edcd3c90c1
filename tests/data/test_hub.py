"""Data sets of the hub, with `datasets.load_dataset` in the hub's place; no test goes to the network.

Run: pytest tests/data/test_hub.py
"""

import io
import os
import tarfile

import pytest

from tests.data.test_formats import CAPTIONS, NAMES, PROMPT, by_image, embedded, plain
from vlm_lora.check.clean import write_clean
from vlm_lora.check.dataset import check_dataset
from vlm_lora.data.example import Dialogue, Turn
from vlm_lora.data.images import content_hash
from vlm_lora.data.readers import read_dataset
from vlm_lora.errors import DataError

datasets = pytest.importorskip("datasets")


@pytest.fixture
def hub(monkeypatch):
    """What `load_dataset` is to give, by the arguments it is called with."""
    tables = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: tables[name, config, split])
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, timeout: None)
    return tables


def table(folder):
    data = {
        "image": [embedded(folder, n) | {"path": None} for n, _ in CAPTIONS],
        "text": [t for _, t in CAPTIONS],
    }
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict(data, features=features)


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("hf:owner/foxes", ("owner/foxes", None, "train")),
        ("owner/foxes", ("owner/foxes", None, "train")),
        ("hf:owner/foxes:test[:4]", ("owner/foxes", None, "test[:4]")),
        ("hf:owner/foxes/small:val", ("owner/foxes", "small", "val")),
    ],
)
def test_a_hub_name(path, asked, hub, pictures, tmp_path):
    folder = pictures(*NAMES)
    hub[asked] = table(folder)
    dataset = read_dataset(path, prompt=PROMPT)
    assert (dataset.format, dataset.bad) == ("hub", ())
    assert dataset.note == "captions: image from 'image', caption from 'text'"
    assert plain(dataset, folder) == by_image([(n, Dialogue((Turn(PROMPT, t),))) for n, t in CAPTIONS])
    for example in reversed(dataset.examples):
        assert content_hash(example.images[0].read_bytes()) == example.images[0].sha256
    assert check_dataset(dataset, val_split=0.5).bad == ()
    write_clean(tmp_path / "clean", dataset.examples, PROMPT)
    copy = read_dataset(tmp_path / "clean", prompt=PROMPT)
    assert [e.dialogues for e in copy.examples] == [e.dialogues for e in dataset.examples]


def test_lists_of_images_and_messages(hub, pictures):
    folder = pictures(*NAMES)
    data = {
        "images": [[embedded(folder, "a.png"), embedded(folder, "b.png")]],
        "messages": [[{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Two."}]],
    }
    role = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = datasets.Features({"images": datasets.List(datasets.Image()), "messages": datasets.List(role)})
    hub["o/n", None, "train"] = datasets.Dataset.from_dict(data, features=features)
    (example,) = read_dataset("hf:o/n", prompt=PROMPT).examples
    assert [ref.read_bytes() for ref in example.images] == [(folder / n).read_bytes() for n in NAMES[:2]]
    assert example.dialogues == (Dialogue((Turn("What?", "Two."),)),)


@pytest.fixture
def streams(monkeypatch, pictures):
    """Real streams of `datasets`, from files of every kind it has another way for; and how many rows were asked."""
    folder = pictures(*NAMES)
    table(folder).to_parquet(folder / "rows.parquet", batch_size=1)
    with tarfile.open(folder / "rows.tar", "w") as tar:
        for number, (name, text) in enumerate(CAPTIONS):
            for suffix, content in (("png", (folder / name).read_bytes()), ("txt", text.encode())):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    real = datasets.load_dataset

    def load(name, config, split, streaming=False):
        kind, ending = {"o/parquet": ("parquet", "parquet"), "o/tar": ("webdataset", "tar")}[name]
        return real(kind, data_files={split: str(folder / f"rows.{ending}")}, split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return folder


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_stream(kind, streams, tmp_path):
    columns = {"image": "png", "caption": "txt"} if kind == "tar" else None
    dataset = read_dataset(f"hf-stream:o/{kind}", prompt=PROMPT, columns=columns)
    assert (dataset.format, dataset.bad) == ("hub", ())
    assert "image from 'png', caption from 'txt'" in dataset.note or "image from 'image'" in dataset.note
    assert plain(dataset, streams) == by_image([(n, Dialogue((Turn(PROMPT, t),))) for n, t in CAPTIONS])
    for example in reversed(dataset.examples):
        assert content_hash(example.images[0].read_bytes()) == example.images[0].sha256
    assert check_dataset(dataset, val_split=0.5).bad == ()
    part = read_dataset(f"hf-stream:o/{kind}:val[1:3]:2", prompt=PROMPT, columns=columns)
    texts = [d.turns[0].assistant for e in part.examples for d in e.dialogues]
    assert texts == [text for _, text in CAPTIONS[1:3]]
    assert {e.weight for e in part.examples} == {2}
    write_clean(tmp_path / "clean", dataset.examples, PROMPT)
    assert len(read_dataset(tmp_path / "clean", prompt=PROMPT).examples) == 3


def test_a_stream_that_breaks_off_and_one_of_files_beside_its_rows(hub, pictures, monkeypatch):
    folder = pictures(*NAMES)

    def rows(breaks):
        for path in (
            "hf://datasets/o/n@1234/a.png",
            "hf://datasets/other/n@1/a.png",
            "hf://datasets/o/n-private@1/a.png",
        ):
            yield {"image": {"bytes": None, "path": path}, "text": path}
        if breaks:
            raise ConnectionError("gone\nmore")

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    whole, broken = (
        datasets.IterableDataset.from_generator(rows, features=features, gen_kwargs={"breaks": breaks})
        for breaks in (False, True)
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: whole)
    opened = []

    class Files:
        def open(self, path, mode):
            opened.append(path)
            return (folder / "a.png").open(mode)

    monkeypatch.setattr("huggingface_hub.HfFileSystem", Files)
    dataset = read_dataset("hf-stream:o/n:train[:3]", prompt=PROMPT)
    assert opened == ["hf://datasets/o/n@1234/a.png"]
    assert [row.line for row in dataset.bad] == [2, 3]
    assert dataset.examples[0].images[0].read_bytes() == (folder / "a.png").read_bytes()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: broken)
    dataset = read_dataset("hf-stream:o/n", prompt=PROMPT)
    assert dataset.bad[-1].reason.startswith("cannot be had from the hub: gone; nothing")
    with pytest.raises(DataError, match="a part of a stream is counted in rows"):
        read_dataset("hf-stream:o/n:train[:10%]", prompt=PROMPT)


def test_a_row_reads_no_file_of_this_machine_and_fetches_nothing(hub, pictures, monkeypatch):
    """F23: `datasets` itself would open any path and any URL that an image's struct names."""
    folder = pictures(*NAMES)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
    pictures("fetched.png", into="cache")
    paths = [folder / "a.png", "http://169.254.169.254/a.png", "/dev/zero", folder / "cache/../b.png"]
    os.symlink(folder / "a.png", folder / "cache/out.png")
    paths += [folder / "cache/out.png", folder / "cache/fetched.png"]
    data = {"image": [{"bytes": None, "path": str(p)} for p in paths], "text": list("abcdef")}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    hub["o/n", None, "train"] = datasets.Dataset.from_dict(data, features=features)
    dataset = read_dataset("hf:o/n", prompt=PROMPT)
    assert [row.line for row in dataset.bad] == [1, 2, 3, 4, 5]
    assert all("which is not fetched" in row.reason for row in dataset.bad)
    assert dataset.examples[0].dialogues[0].turns[0].assistant == "f"


def test_what_is_wrong_is_one_line(hub, monkeypatch):
    def fails(*_, **__):
        raise ConnectionError("Couldn't reach 'owner/foxes' on the Hub\nmore")

    with pytest.raises(DataError, match="expected hf:owner/name"):
        read_dataset("hf:foxes", prompt=PROMPT)
    hub["o/n", None, "all"] = datasets.DatasetDict()
    with pytest.raises(DataError, match="expected one split"):
        read_dataset("hf:o/n:all", prompt=PROMPT)
    hub["o/n", None, "train"] = datasets.Dataset.from_dict({"x": [1]})
    with pytest.raises(DataError, match="none of 1 rows is understood: their fields are 'x'"):
        read_dataset("hf:o/n", prompt=PROMPT)
    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(DataError, match="'hf:owner/foxes': the hub gave no data set 'owner/foxes'"):
        read_dataset("hf:owner/foxes", prompt=PROMPT)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fails)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("tried again and again"))
    with pytest.raises(DataError, match="no such folder or file, and the hub gave no data set of this name") as told:
        read_dataset("owner/foxes", prompt=PROMPT)
    assert "Couldn't reach" in str(told.value)
    assert "\n" not in str(told.value)


def test_a_name_below_a_folder_that_is_here_is_never_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match="'data/photo': there is no such folder or file; check the name"):
        read_dataset("data/photo", prompt=PROMPT)
