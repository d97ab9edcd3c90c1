"""`eval --review`: its numbers are those of the stock model, and wrong captions come first."""

import json

import pytest
import torch
from PIL import Image

from tests.conftest import picture
from vlm_lora import TrainConfig, read_dataset, train
from vlm_lora.cli import main
from vlm_lora.inference.caption import Decoding
from vlm_lora.inference.captioner import Captioner
from vlm_lora.inference.evaluate import evaluate
from vlm_lora.inference.review import review
from vlm_lora.inference.scores import Scores
from vlm_lora.inference.verdict import summary
from vlm_lora.model.adapters.methods import attach_adapter
from vlm_lora.model.backbone import load_backbone
from vlm_lora.model.features import FeatureCache


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_scores_are_the_stock_models(checkpoints, photo_folder, family):
    captioner = Captioner.load(str(checkpoints[family]))
    dataset = read_dataset(photo_folder, prompt="Say it.")
    rows = review(captioner, dataset.examples[:4])
    assert [row.score for row in rows] == sorted(row.score for row in rows)
    processor, model = captioner.backbone.processor, captioner.backbone.model
    for row in rows:
        for told, path in ((row.likely, photo_folder / row.image), (row.blind, None)):
            image = Image.open(photo_folder / row.image).convert("RGB")
            image = image if path else Image.new("RGB", image.size, (128, 128, 128))
            ask = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Say it."}]}]
            text = processor.apply_chat_template(ask, add_generation_prompt=True)
            inputs = processor(text=[text + row.answer + "<|im_end|>"], images=[image], return_tensors="pt")
            asked = processor(text=[text], images=[image], return_tensors="pt")["input_ids"].shape[1]
            labels = inputs["input_ids"].clone()
            labels[:, :asked] = -100
            with torch.no_grad():
                assert told == pytest.approx(-model(**inputs, labels=labels).loss.item(), rel=1e-4)
    assert any(abs(row.score) > 1e-4 for row in rows)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_the_last_answer_of_a_conversation_counts_whatever_is_learnt_of_it(checkpoints, tmp_path, family):
    """Its second image stands in a later turn, its last answer has no loss; a row of text has no picture."""
    folder = tmp_path
    for name in ("a.png", "b.png"):
        picture(ord(name[0])).save(folder / name)
    said = ["<image>What is it?", "A fox.", "And in <image> here?", "An owl."]
    roles = ("user", "assistant") * 2
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    messages[-1]["loss"] = False
    rows = [{"images": ["a.png", "b.png"], "messages": messages}, {"question": "2 + 2?", "answer": "4"}]
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    captioner = Captioner.load(str(checkpoints[family]))
    (row,) = review(captioner, read_dataset(folder / "x.jsonl").examples)
    assert (row.question, row.answer) == ("And in  here?", "An owl.")
    processor, model = captioner.backbone.processor, captioner.backbone.model
    image, word = {"type": "image"}, lambda text: {"type": "text", "text": text}
    ask = [
        {"role": "user", "content": [image, word("What is it?")]},
        {"role": "assistant", "content": [word("A fox.")]},
        {"role": "user", "content": [word("And in "), image, word(" here?")]},
    ]
    text = processor.apply_chat_template(ask, add_generation_prompt=True)
    seen = [Image.open(folder / name).convert("RGB") for name in ("a.png", "b.png")]
    asked = processor(text=[text], images=seen, return_tensors="pt")["input_ids"].shape[1]
    inputs = processor(text=[text + "An owl.<|im_end|>"], images=seen, return_tensors="pt")
    labels = inputs["input_ids"].clone()
    labels[:, :asked] = -100
    with torch.no_grad():
        assert row.likely == pytest.approx(-model(**inputs, labels=labels).loss.item(), rel=1e-4)
    assert abs(row.score) > 1e-4


def test_wrong_captions_come_first(checkpoints, tmp_path, capsys):
    """Four kinds of picture, one caption in the wrong place, an image that is gone."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(24):
        picture(i % 4).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(("red fox", "blue owl", "green frog", "grey cat")[i % 4])
    config = TrainConfig(
        data=str(folder), model="tiny", output=str(tmp_path / "run"), max_steps=40, batch_size=8, lr=3e-3, val_split=0.0
    )
    train(config)
    (folder / "07.txt").write_text("red fox")  # the picture of a cat
    (folder / "09.png").write_bytes(b"nothing")
    command = ["eval", str(folder), "--adapter", str(tmp_path / "run"), "--review"]
    assert main(command) == 3
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == 24
    assert (rows[0]["image"], rows[0]["caption"]) == ("07.png", "red fox")
    assert rows[0]["score"] < 0 < rows[1]["score"]
    assert rows[0]["score"] == pytest.approx(rows[0]["log_probability"] - rows[0]["without_picture"], abs=2e-4)
    assert "is not an image" in rows[-1]["error"]
    assert err.splitlines()[-1] == "1 rows could not be looked at."
    assert main([*command, "--output", str(tmp_path / "out")]) == 3
    assert (tmp_path / "out" / "review.jsonl").read_text() == out
    assert main([*command, "--blank"]) == 2
    rows = [{"image": f"{i:02}.png", "caption": "red fox", "split": s} for i, s in enumerate(["train", "val", "test"])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "rows.jsonl"), "--images", str(folder), *command[2:]]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3, "of whatever part of the data"


def test_answers_that_stay_the_same_are_guessed(checkpoints, tmp_path):
    """Against answering by hand with the pictures exchanged; a damaged neighbour takes no part."""
    backbone = load_backbone(str(checkpoints["qwen2_vl"]))
    adapter = attach_adapter(backbone, TrainConfig(data="none", rank=4, seed=1))
    for i, (_, parameter) in enumerate(adapter.named_parameters()):
        torch.manual_seed(i)
        parameter.data = torch.randn_like(parameter.data) * 0.3
    captioner = Captioner(backbone, adapter, FeatureCache(backbone, None), "Say it.")
    for i in range(5):
        picture(i // 2).save(tmp_path / f"{i}.png")  # 0 and 1 are alike, 2 and 3
        (tmp_path / f"{i}.txt").write_text("It.")
    examples = read_dataset(tmp_path, prompt="Say it.").examples
    (tmp_path / "1.png").write_bytes(b"nothing")
    how = Decoding(max_new_tokens=3)
    evaluation = evaluate(captioner, examples, swapped=True, decoding=how)
    seen = [tmp_path / f"{i}.png" for i in (0, 2, 3, 4)]
    own = [captioner.answer(path, "Say it.", decoding=how) for path in seen]
    other = [captioner.answer(path, "Say it.", decoding=how) for path in (*seen[1:], seen[0])]
    grey = [captioner.answer(Image.new("RGB", (64, 64), (128,) * 3), "Say it.", decoding=how)] * 4
    told = evaluation.scores.unmoved
    assert told["other"].share == sum(a == b for a, b in zip(own, other, strict=True)) / 4
    assert told["blanked"].share == sum(a == b for a, b in zip(own, grey, strict=True)) / 4
    assert 0 < told["other"].share < 1
    assert told["other"].low <= told["other"].share <= told["other"].high
    assert Scores.from_json(json.loads(json.dumps(evaluation.scores.to_json()))) == evaluation.scores
    assert "with another picture in its place" in summary(evaluation.scores)[-1]
    assert evaluate(captioner, examples, blanked=True, decoding=how).scores.unmoved is None
