"""Prompts with variables: from each kind of data, the same for training and for captioning, and what is missing."""

import json
import warnings

import pytest

from tests.conftest import picture
from vlm_lora.cli import main
from vlm_lora.config import TrainConfig
from vlm_lora.data.example import ImageRef
from vlm_lora.data.readers import read_dataset
from vlm_lora.data.readers.beside import prompt_for
from vlm_lora.data.readers.prompts import literal, variables_of
from vlm_lora.errors import AdapterError, DataError
from vlm_lora.inference.caption import source_of
from vlm_lora.inference.captioner import Captioner
from vlm_lora.model.adapters.base import read_contract
from vlm_lora.model.adapters.methods import attach_adapter
from vlm_lora.model.backbone import load_backbone

PROMPT = "What is in {name} ({stem}) of {folder}? Tags: {tags}."


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "10_fox"
    folder.mkdir()
    for i, name in enumerate(["a.png", "b c.png"]):
        picture(i).save(folder / name)
    return folder


def asked(dataset) -> dict[str, str]:
    assert dataset.bad == ()
    return {example.images[0].name: example.dialogues[0].turns[0].user for example in dataset.examples}


def as_captioned(folder, prompt=PROMPT) -> dict[str, str]:
    return {path.name: prompt_for(prompt, source_of(path)) for path in sorted(folder.glob("*.png"))}


def test_variables_are_named_once_and_may_stand_for_themselves():
    assert variables_of("{tags} and {name}, {tags}; {{no}} { } {}") == ["tags", "name"]
    assert prompt_for("{{name}} {x", None) == "{name} {x"
    assert prompt_for(literal("Say {name} or {{x}}."), None) == "Say {name} or {x}."


def test_sidecars_beside_their_tags(folder):
    for stem in ("a", "b c"):
        (folder / f"{stem}.caption").write_text(f"A picture of {stem}.")
        (folder / f"{stem}.txt").write_text(f"fox,\n tag {stem}\n")
    wanted = {
        "a.png": "What is in a.png (a) of 10_fox? Tags: fox, tag a.",
        "b c.png": "What is in b c.png (b c) of 10_fox? Tags: fox, tag b c.",
    }
    assert asked(read_dataset(folder, prompt=PROMPT)) == wanted == as_captioned(folder)
    assert len(read_dataset(folder).bad) == 2  # without {tags} two captions stay two too many
    (folder / "a.tags").write_text("wolf")
    assert "Tags: wolf." in asked(read_dataset(folder, prompt=PROMPT))["a.png"]
    assert "Tags: wolf." in as_captioned(folder)["a.png"]


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_columns_of_metadata(folder, form):
    rows = [
        {"file_name": "a.png", "text": "A.", "tags": "fox", "place": "Oslo"},
        {"file_name": "b c.png", "text": "B.", "tags": "owl", "place": "Bergen"},
    ]
    if form == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    prompt = PROMPT + " In {place}."
    told = asked(read_dataset(folder, prompt=prompt))
    assert told["b c.png"] == "What is in b c.png (b c) of 10_fox? Tags: owl. In Bergen."
    assert told == as_captioned(folder, prompt)
    if form == "jsonl":  # read anew where it has changed
        (folder / "metadata.jsonl").write_text(json.dumps(rows[0] | {"place": ["Rome", 7]}) + "\n")
        assert prompt_for("{place}", source_of(folder / "a.png")) == "Rome, 7"


def test_coco_and_a_folder_below(tmp_path):
    (tmp_path / "images" / "owls").mkdir(parents=True)
    picture(1).save(tmp_path / "images" / "owls" / "x.png")
    image = {"id": 1, "file_name": "images/owls/x.png", "licence": 4}
    document = {"images": [image], "annotations": [{"image_id": 1, "id": 7, "caption": "A.", "by": "Ann"}]}
    (tmp_path / "captions.json").write_text(json.dumps(document))
    dataset = read_dataset(tmp_path / "captions.json", prompt="{folder}/{stem} {by} {licence}")
    assert list(asked(dataset).values()) == ["owls/x Ann 4"]


def test_what_is_missing_names_its_file(folder, capsys):
    (folder / "a.txt").write_text("A fox.")
    (folder / "b c.txt").write_text("An owl.")
    dataset = read_dataset(folder, prompt="Tags: {tags}.")  # the only text is the caption, which is to be learnt
    assert [row.source for row in dataset.bad] == ["a.png", "b c.png"]
    assert "'a.png' has no tags, which the prompt asks for by {tags}" in dataset.bad[0].reason
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "A.", "x": None}) + "\n")
    for name in ("text", "x", "y"):  # the caption itself, an empty column, none
        bad = read_dataset(folder / "metadata.jsonl", prompt=f"Say {{{name}}}").bad
        assert bad[0].reason.startswith(f"'a.png' has no {name}, which the prompt asks for by {{{name}}}: its columns")
    with pytest.raises(DataError, match="comes from no file"):
        prompt_for("{name}", picture(1))
    command = ["caption", str(folder / "a.png"), str(folder / "b c.png"), "--model", "tiny", "--max-new-tokens", "2"]
    assert main([*command, "--prompt", "What? {x}"]) == 1
    assert main([*command, "--prompt", "What? {file_name}"]) == 3  # only the one has a row
    out, err = capsys.readouterr()
    assert "b c.png' has no file_name, which the prompt asks for by {file_name}: no row of data names it" in err
    assert out.startswith(str(folder / "a.png"))


def test_a_link_to_elsewhere_is_no_file_of_tags(folder, tmp_path):
    (tmp_path / "secret").write_text("key")
    (folder / "a.tags").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match=r"'a.tags' is a link"):
        prompt_for("{tags}", ImageRef(path=folder / "a.png", name="a.png"))


def test_the_contract_keeps_the_variables_and_checks_them(checkpoints, tmp_path, folder):
    model = str(checkpoints["qwen2_vl"])
    for name, prompt in (("with", PROMPT), ("without", "Say it.")):
        adapter = attach_adapter(load_backbone(model), TrainConfig(data="none", rank=2, prompt=prompt))
        adapter.save(tmp_path / name)
    assert read_contract(tmp_path / "with").variables == ["name", "stem", "folder", "tags"]
    assert "variables" not in json.loads((tmp_path / "without" / "contract.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Captioner.load(model, tmp_path / "with").prompt == PROMPT
        Captioner.load(model, tmp_path / "without", prompt="Say more.")
    for name, prompt in (("with", "Say it."), ("without", "Say {name}.")):
        with pytest.warns(UserWarning, match="has other variables"):
            Captioner.load(model, tmp_path / name, prompt=prompt)
    contract = json.loads((tmp_path / "with" / "contract.json").read_text())
    earlier = {key: value for key, value in contract.items() if key != "variables"}
    (tmp_path / "with" / "contract.json").write_text(json.dumps(earlier))
    old = Captioner.load(model, tmp_path / "with")  # of a version that took the prompt as it is
    assert prompt_for(old.prompt, source_of(folder / "a.png")) == PROMPT
    (tmp_path / "with" / "contract.json").write_text(json.dumps(contract | {"variables": ["x"]}))
    with pytest.raises(AdapterError, match="other variables than x"):
        read_contract(tmp_path / "with")


def test_captions_are_asked_for_with_the_variables(folder):
    """What the model is asked is what it was trained with: the same words as the whole prompt by hand."""
    (folder / "a.tags").write_text("fox, snow")
    (folder / "b c.tags").write_text("owl, tree")
    captioner = Captioner.load("tiny", prompt="Is the {tags} in {name} red?")
    captions = [caption.text for caption in captioner.caption(sorted(folder.glob("*.png")), batch_size=2)]
    by_hand = [
        captioner.answer(folder / "a.png", "Is the fox, snow in a.png red?"),
        captioner.answer(folder / "b c.png", "Is the owl, tree in b c.png red?"),
    ]
    assert captions == by_hand
    assert list(captioner.stream(folder / "a.png"))[-1] == by_hand[0]
