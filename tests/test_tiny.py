"""The embedded base model: the layout of the big ones, and it truly sees."""

import json

import pytest
import torch

from tests.conftest import ROOT, TINY
from vlm_lora.data.images import load_image
from vlm_lora.data.readers import read_dataset
from vlm_lora.inference.captioner import Captioner, Decoding
from vlm_lora.model.folder import tiny_path


def test_it_is_a_plain_qwen2_vl_and_small():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    assert tiny_path() == TINY
    assert sum(path.stat().st_size for path in TINY.iterdir()) < 15 * 2**20
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {
        p.name for p in TINY.iterdir()
    }
    model, report = AutoModelForImageTextToText.from_pretrained(TINY, output_loading_info=True)
    assert type(model).__name__ == "Qwen2VLForConditionalGeneration"
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(AutoProcessor.from_pretrained(TINY)).__name__ == "Qwen2VLProcessor"
    assert json.loads((TINY / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.fixture(scope="module")
def seen():
    """(emoji in the picture, caption of the base) of sixty scenes that it was not pretrained on."""
    torch.set_num_threads(2)
    examples = read_dataset(ROOT / "data/emoji_scenes", prompt="-").examples[:60]
    captioner = Captioner.load("tiny")
    images = [load_image(example.images[0]) for example in examples]
    said = [caption.text for caption in captioner.caption(images, decoding=Decoding(max_new_tokens=32))]
    return examples, said


def test_its_captions_name_what_is_there(seen):
    """Words of the base's captions against the references of the same picture, and of another."""
    examples, said = seen
    common = {"the", "a", "an", "picture", "shows", "to", "of", "and", "left", "right", "above", "below"}

    def overlap(text: str, example) -> float:
        words = set(text.lower().rstrip(".").replace(",", "").split()) - common
        references = " ".join(d.turns[0].assistant.lower() for d in example.dialogues)
        return sum(word in references.replace(".", " ").replace(",", " ").split() for word in words) / max(
            1, len(words)
        )

    own = sum(overlap(text, example) for text, example in zip(said, examples, strict=True)) / len(said)
    shuffled = sum(
        overlap(text, example) for text, example in zip(said, (*examples[1:], examples[0]), strict=True)
    ) / len(said)
    assert own > 0.75, own
    assert shuffled < 0.2, shuffled
