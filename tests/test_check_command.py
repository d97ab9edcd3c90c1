"""`vlm-lora check` as a user meets it: what it prints, what it writes, its exit code; tokens as in training.

Run: pytest tests/test_check_command.py
"""

import json

import pytest
import torch

from tests.conftest import picture
from vlm_lora.check.tokens import count_tokens
from vlm_lora.cli import main
from vlm_lora.data.readers import read_dataset
from vlm_lora.model.backbone import load_backbone
from vlm_lora.model.encode import Encoder
from vlm_lora.model.features import FeatureCache
from vlm_lora.model.preprocess import load_preprocessor


def check(*command, capsys):
    code = main(["check", *map(str, command)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_good_folder_for_a_person(photo_folder, capsys):
    (photo_folder / "00.txt").write_text("\x1b[2J twice")
    (photo_folder / "01.txt").write_text("\x1b[2J twice")
    code, out, _ = check(photo_folder, "--model", "tiny", capsys=capsys)
    assert code == 0
    assert "sidecar: 12 examples, 12 images, 12 answers" in out
    assert "2 times: \\x1b[2J twice" in out
    assert "texts that --write-clean would change: 2 (control characters 2)" in out
    assert "<|image_pad|> x 16<|vision_end|>Describe this image.<|im_end|>" in out
    assert "<|im_end|>«" in out
    assert out.endswith("every row can be used\n")
    assert "\x1b" not in out


def test_bad_rows_and_long_rows_give_exit_code_1(photo_folder, capsys):
    (photo_folder / "03.png").write_bytes(b"no picture")
    (photo_folder / "04.txt").write_text("word " * 3000)
    code, out, _ = check(photo_folder, "--json", "--model", "tiny", "--max-tokens", 500, capsys=capsys)
    facts = json.loads(out)
    assert code == 1
    assert (facts["examples"], facts["images"], facts["answers"]) == (10, 11, 10)
    assert [(row["source"], row["line"]) for row in facts["bad"]] == [("03.png", 1), ("04.png", 1)]
    assert "is not an image that can be read" in facts["bad"][0]["reason"]
    assert "--max-tokens is 500" in facts["bad"][1]["reason"]
    assert facts["tokens"]["too_long"] == 1
    assert check(photo_folder, capsys=capsys)[0] == 1


def test_tokens_are_those_of_training_without_the_tower(photo_folder, capsys):
    picture(1, (900, 3)).save(photo_folder / "00.png")  # one that is padded
    _, out, _ = check(photo_folder, "--json", "--model", "tiny", "--max-pixels", 6000, capsys=capsys)
    facts = json.loads(out)["tokens"]
    backbone = load_backbone("tiny", device=torch.device("cpu"), max_pixels=6000)
    features, encoder = FeatureCache(backbone, None), Encoder(backbone)
    packed, longest = 0, 0
    for example in read_dataset(photo_folder, prompt="Describe this image.").examples:
        grids = torch.stack([entry.grid_thw for entry in features.get(example.images)])
        encoded = encoder.encode(example.dialogues, grids)
        packed += len(encoded.prefix_ids) + sum(len(branch.input_ids) for branch in encoded.branches)
        longest = max(longest, *(len(encoded.prefix_ids) + len(branch.input_ids) for branch in encoded.branches))
    assert (facts["packed"], facts["longest"]) == (packed, longest)
    assert sum(facts["histogram"].values()) == 12
    learnt = [part["text"] for part in facts["sample"] if part["learnt"]]
    assert learnt == ["A picture of number 0.<|im_end|>"]
    assert load_preprocessor("tiny").image_token_id == backbone.image_token_id


def test_tokenising_ahead_gives_the_tokens_of_one_after_the_other(photo_folder, monkeypatch):
    texts = ["<|im_end|> x", " two\nlines ", "雪 ❄", "", "a " * 300, "07"]
    for number, text in enumerate(texts):
        (photo_folder / f"{number:02}.txt").write_text(text or "x")
    examples = read_dataset(photo_folder, prompt=" Describe.").examples
    base = load_preprocessor("tiny")
    sizes = {ref: (64, 64) for example in examples for ref in example.images}
    ahead = count_tokens(base, examples, sizes, 4096)
    together = []
    monkeypatch.setattr(Encoder, "tokenize_ahead", lambda self, some: together.append(len(some)))
    monkeypatch.setattr("vlm_lora.check.tokens.AT_ONCE", 5)
    assert count_tokens(base, examples, sizes, 4096) == ahead
    assert together == [5, 5, 2]


def test_sheet_and_clean_copy(photo_folder, tmp_path, capsys):
    (photo_folder / "03.png").write_bytes(b"no picture")
    command = [photo_folder, "--html", tmp_path / "sheet.html", "--write-clean", tmp_path / "clean"]
    assert check(*command, capsys=capsys)[0] == 1
    assert (tmp_path / "sheet.html").read_text().count("<article>") == 11
    code, out, _ = check(tmp_path / "clean", capsys=capsys)
    assert code == 0
    assert out.startswith("imagefolder: 11 examples, 11 images, 11 answers\n")
    code, _, err = check(*command, capsys=capsys)
    assert (code, err) == (
        1,
        f"vlm-lora: --write-clean {tmp_path / 'clean'}: is there already; give a new or an empty folder\n",
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--val-split", "1"], "--val-split is 1.0; expected a number from 0 to below 1"),
        (["--max-pixels", "9216"], "say --model too"),
        (["--images", "nowhere"], "--images nowhere: there is no such folder"),
    ],
)
def test_wrong_flags(flags, message, photo_folder, capsys):
    code, _, err = check(photo_folder, *flags, capsys=capsys)
    assert code == 2
    assert message in err


def test_two_sources_and_a_held_out_set(photo_folder, tmp_path, capsys):
    more, val = tmp_path / "more", tmp_path / "val"
    for folder, numbers in ((more, (20, 21)), (val, (3, 30))):
        folder.mkdir()
        for i in numbers:
            picture(i, (64 + 16 * (i % 3), 64)).save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text("A picture." + " word" * 900 * (i == 30))
    command = [photo_folder, f"{more}:5", "--val", val]
    code, out, _ = check(*command, capsys=capsys)
    assert code == 1
    assert out.startswith("sidecar: 13 examples, 15 images, 13 answers\n")
    assert f"{more}: 2 examples, 2 answers, each 5 times an epoch; sidecar\n" in out
    assert "held out: 2 examples, 2 answers\n" in out
    (bad,) = [line for line in out.splitlines() if line.startswith("bad: ")]
    assert bad.startswith(f"bad: {photo_folder}/03.png:1: its image is in the held-out data too ('{val}/3.png' of")
    code, out, _ = check(*command, "--json", "--model", "tiny", "--max-tokens", 500, capsys=capsys)
    facts = json.loads(out)
    assert code == 1
    assert (facts["examples"], facts["held_out"]) == (13, {"examples": 1, "answers": 1})
    assert facts["bad"][1]["source"] == f"{val}/30.png"
    (photo_folder / "03.png").unlink(), (photo_folder / "03.txt").unlink()
    alone = [json.loads(check(f, "--json", "--model", "tiny", capsys=capsys)[1]) for f in (photo_folder, more)]
    assert facts["tokens"]["packed"] == alone[0]["tokens"]["packed"] + 5 * alone[1]["tokens"]["packed"]


def test_columns_of_other_names_and_images_elsewhere(photo_folder, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    rows = [{"bild": f"../photos/{i:02}.png", "satz": "x"} for i in range(3)]
    (tmp_path / "data/x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ["--columns", "image=bild, caption=satz"]
    code, out, _ = check(tmp_path / "data", *columns, capsys=capsys)
    assert code == 1
    assert out.count("pass --allow-outside to trust it") == 3
    code, out, _ = check(tmp_path / "data", *columns, "--allow-outside", capsys=capsys)
    assert code == 0
    assert "taken for captions: image from 'bild', caption from 'satz'" in out
    assert check(tmp_path / "data", "--columns", "bild", capsys=capsys)[0] == 2
    command = ["train", str(tmp_path / "data"), "--allow-outside", "--columns", "image=bild,caption=satz"]
    command += ["--model", "tiny", "--max-steps", "1", "--no-eval", "--output", str(tmp_path / "run")]
    assert main(command) == 0


def test_where_nothing_can_be_written_is_told_before_anything_is_read(photo_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vlm_lora.data.readers.read_dataset", lambda *_, **__: pytest.fail("read"))
    (tmp_path / "file").touch()
    for flag, target in (("--html", tmp_path), ("--html", tmp_path / "file/x"), ("--write-clean", tmp_path / "file/x")):
        code, _, err = check(photo_folder, flag, target, capsys=capsys)
        assert (code, err.count("\n")) == (1, 1)
        assert err.startswith(f"vlm-lora: {flag} {target}: cannot be written: ")


def test_a_copy_of_weighed_data_says_what_it_does_not_keep(photo_folder, tmp_path, capsys):
    _, _, err = check(f"{photo_folder}:3", "--write-clean", tmp_path / "clean", capsys=capsys)
    assert "The copy holds each answer once" in err


def test_names_that_would_clear_the_screen_are_escaped_in_errors(photo_folder, capsys):
    (photo_folder / "\x1b[2J.png").write_bytes(b"x")
    assert main(["train", str(photo_folder), "--model", "tiny"]) == 1
    err = capsys.readouterr().err
    assert "\\x1b[2J.png: has no caption" in err
    assert "\x1b" not in err
    assert "(vlm-lora check " in err
