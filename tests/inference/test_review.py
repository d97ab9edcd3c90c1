"""`eval --review`: its numbers are those of the stock model, and wrong captions come first."""

import json

import pytest
import torch
from PIL import Image

from tests.conftest import picture
from vlm_lora import TrainConfig, read_dataset, train
from vlm_lora.cli import main
from vlm_lora.inference.captioner import Captioner
from vlm_lora.inference.review import review


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
